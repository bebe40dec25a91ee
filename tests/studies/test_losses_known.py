"""How well a limit is known: what it still goes where it comes to rest slowly, and what is none."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses.audit import _point
from rl_ebm.studies.losses.cases import Case, asked, cases_of
from rl_ebm.studies.losses.distillation import Distillation
from rl_ebm.studies.losses.flow import Limit, Marks
from rl_ebm.studies.losses.responses import normalised

SCORES = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _solution() -> Solution:
    return solve(EBM(TokenSpace(3, 1), SCORES, beta=0.5))


@pytest.mark.parametrize("slow", [1e-2, 3e-4])
def test_a_rest_that_is_come_to_slowly_is_known_no_better_than_what_is_left(slow: float) -> None:
    """In float32: of two differences to the teacher one falls so many times slower."""

    def loss(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        off = (student - teacher).float()
        first, second = off[..., 0] - off[..., 1], off[..., 1] - off[..., 2]
        return (first.square() + slow * second.square()).mean().double()

    found = audit_loss(loss, _solution(), "distillation", beyond=False)
    error = float(tv(found.log_laws[0], torch.log_softmax(SCORES / 0.5, 0)))
    assert error > 1e-7  # it is in float32, and
    assert error <= 2 * found.accuracy + 1e-6
    assert found.accuracy < 0.1


@pytest.mark.parametrize("eos_id", [None, 0])
@pytest.mark.parametrize("rough", [True, False])
def test_what_cancels_in_the_mean_is_no_gradient_in_float32_either(
    eos_id: int | None, rough: bool
) -> None:
    """Each token is charged what its state alone decides: a baseline, that teaches nothing."""
    space = TokenSpace(3, 3, eos_id=eos_id)
    generator = torch.Generator().manual_seed(5)
    tables = [torch.randn(space.num_prefixes(t), 3, generator=generator).double() for t in range(3)]
    reward = torch.randn(space.num_sequences, generator=generator).double()
    reference = Tabular.from_tables(tables, space)
    solution = solve(EBM(space, reward, beta=0.5, reference=reference))

    def charged(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        if rough:
            student, teacher = student.float(), teacher.float()
        log_pi = student.log_softmax(-1)
        charge = (log_pi - teacher.log_softmax(-1)).square().sum(-1).detach()
        taken = log_pi.gather(-1, tokens[..., None])[..., 0]
        return (charge * taken).masked_fill(~mask, 0.0).sum() / mask.sum()

    found = audit_loss(charged, solution, "distillation", sampler="student", beyond=False)
    start = _case(charged, solution).responses
    want = start.log_law(normalised(start.start, start.start))
    assert not found.is_target
    assert found.accuracy < 1e-5
    assert float(tv(found.log_laws[0], want)) < 1e-6


def _teachers_top(student: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
    """Forward KL on the teacher's two likeliest tokens, as if there were no others: smooth."""
    best = teacher.topk(2, dim=-1).indices
    own, taught = (x.gather(-1, best).log_softmax(-1) for x in (student, teacher))
    return (taught.exp() * (taught - own)).sum(-1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_a_smooth_loss_with_rests_beside_each_is_known_to_the_last_digits(steps: int) -> None:
    """The two logits keep their sum and take the teacher's difference, and the others stay."""
    space = TokenSpace(4, steps)
    generator = torch.Generator().manual_seed(20)
    tables = [torch.randn(4**t, 4, generator=generator).double() for t in range(steps)]
    reward = torch.randn(4**steps, generator=generator).double()
    reference = Tabular.from_tables(tables, space)
    solution = solve(EBM(space, reward, beta=1.0, reference=reference))
    found = audit_loss(_teachers_top, solution, "distillation", beyond=False)
    flow = _case(_teachers_top, solution).flow
    assert isinstance(flow, Distillation)
    want = flow.responses.start.clone()
    for row, taught in zip(want, flow.teacher, strict=True):
        best = taught.topk(2).indices
        row[best] = taught[best] + row[best].mean() - taught[best].mean()
    law = flow.responses.log_law(want.log_softmax(-1))
    assert found.how == "flow, to one rest of many"
    assert found.accuracy < 1e-4
    assert float(tv(found.log_laws[0], law)) <= found.accuracy


def test_what_is_left_is_as_it_came_by_what_is_left_of_the_motion() -> None:
    """Along one line a law is as far from its end as D is from 0."""
    case = _case(_squared, _solution())
    r = case.responses
    aim = torch.log_softmax(torch.tensor([[1.0, 0.0, -1.0]]).double(), 1)
    step = torch.tensor([[1e-3, 0.0, -1e-3]]).double()
    marks = Marks(r)
    for size in (1.0, 0.5, 0.1, 0.02, 0.01):
        marks.see(size, aim + size * step)
    assert [size for size, _ in marks.seen] == [1.0, 0.1, 0.01]
    end = Limit(aim, r.log_law(normalised(aim + 0.004 * step, r.start)), aim > 1, 0.0)
    want = float(tv(end.log_law, r.log_law(aim)))
    assert marks.known(end, 0.004).accuracy == pytest.approx(want, rel=1e-3)
    assert marks.known(replace(end, accuracy=0.5), 0.004).accuracy == 0.5
    assert marks.known(end, 0.0).accuracy == 0.0
    assert Marks(r).known(end, 0.004).accuracy == 0.0


def _squared(student: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def _case(loss: Callable[..., Tensor], solution: Solution) -> Case:
    (case,) = cases_of(asked(loss, "distillation", "centred", None, None, 1, None, None), solution)
    return case


@pytest.mark.parametrize(
    ("kink", "words"), [(True, "slides along a kink"), (False, "comes to one rest of many")]
)
def test_a_limit_that_is_known_too_little_is_none(kink: bool, words: str) -> None:
    case = _case(_squared, _solution())
    law = case.responses.log_law(case.responses.start)
    dead = torch.zeros(1, 3, dtype=torch.bool)
    end = Limit(case.responses.start, law, dead, 0.09, kink)
    near = _point(case, end)
    assert near.log_law is not None
    assert torch.equal(near.log_law, law)
    far = _point(case, replace(end, accuracy=0.11))
    assert far.log_law is None
    assert far.degenerate is None
    assert far.how == f"{words}, and was not followed to its end"
