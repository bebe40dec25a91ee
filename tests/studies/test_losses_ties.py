"""Ties that hold: a flow along the kinks between equal logits, against rests known otherwise."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from loss_cases import alone, either_top_two, top_two
from torch import Tensor

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.envs import make_task
from rl_ebm.exact import Solution
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.distillation import Distillation
from rl_ebm.studies.losses.ties import followed_on_ties, pull

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _solution(actions: int, steps: int, eos: int | None = None, seed: int = 0) -> Solution:
    space = TokenSpace(actions, steps, eos_id=eos)
    generator = torch.Generator().manual_seed(seed)
    tables = [
        1.5 * torch.randn(space.num_prefixes(t), actions, generator=generator).double()
        for t in range(steps)
    ]
    reward = torch.randn(space.num_sequences, generator=generator).double()
    return solve(EBM(space, reward, beta=0.5, reference=Tabular.from_tables(tables, space)))


def _flow(loss: Loss, solution: Solution) -> Distillation:
    (case,) = cases_of(asked(loss, "distillation", "centred", None, None, 1, None, None), solution)
    assert isinstance(case.flow, Distillation)
    return case.flow


@pytest.mark.parametrize("order", [1, -1])
def test_equals_move_as_one_by_how_hard_each_is_pushed(order: int) -> None:
    """Pushed down at g where it is the highest, and else still: 1 / sum of 1 / g, whoever it is."""
    pushes = torch.tensor([[0.5, 2.0, 0.3, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    tied = torch.tensor([[True, True, False, True], [False] * 4])
    theta = torch.tensor([[1.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        highest = torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0)
        still = torch.tensor([0.0, 0.0, 0.7, 0.0]).double()
        return still - highest * pushes

    found = pull(f, theta, tied, order)
    speed = -1 / (1 / 0.5 + 1 / 2.0 + 1 / 1.0)
    want = torch.tensor([[speed, speed, 0.7, speed], [-1.0, 0.0, 0.7, 0.0]]).double()
    assert torch.allclose(found.velocity, want, atol=1e-7)
    assert bool(found.holds.all())
    assert float(found.least[0]) == pytest.approx(-speed / 2.0, abs=1e-7)


def test_what_is_not_held_together_is_seen() -> None:
    """The highest is pushed further up."""
    theta = torch.zeros(1, 2, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0) + torch.tensor([0, 2])

    assert not bool(pull(f, theta, torch.ones(1, 2, dtype=torch.bool), 1).holds)


def _above(count: int, weight: float) -> Loss:
    """Convex: half the squared distance from the teacher's logits, and the sum of the highest."""

    def loss(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        near = (student - teacher).square().sum(-1) / 2
        return ((near + weight * student.topk(count, -1).values.sum(-1)) * mask).sum() / mask.sum()

    return loss


def _least(m: Tensor, count: int, weight: float) -> Tensor:
    """Its minimum: the first i less the weight, n equals, the rest as it is; all i, n are tried."""
    order = m.argsort(descending=True)
    s, found = m[order], []
    for i, n in itertools.product(range(count + 1), range(len(m) + 1)):
        if i + n > len(m) or not (i + n > count > i or (n == 0 and i == count)):
            continue
        x = s.clone()
        x[:i] -= weight
        if n:
            x[i : i + n] = (s[i : i + n].sum() - weight * (count - i)) / n
        best = x.topk(count).values.sum()
        found.append((float(((x - s).square().sum() / 2 + weight * best)), x))
    return torch.empty_like(m).scatter(0, order, min(found, key=lambda pair: pair[0])[1])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "weight"), [(1, 4.0), (2, 2.0)])
def test_a_convex_loss_ends_at_its_minimum(count: int, weight: float) -> None:
    """Logits come from where the reference has them: they meet, are held, and are left behind."""
    flow = _flow(_above(count, weight), _solution(4, 2))
    r = flow.responses
    end = followed_on_ties(alone(flow), r.start)
    assert end is not None
    want = torch.stack([_least(row, count, weight) for row in flow.teacher])
    equal = (want[:, :, None] == want[:, None]).sum((1, 2))
    assert int((equal > 4).sum()) >= 4  # not only each with itself, and
    assert int(equal.max()) > 8  # three at least
    assert end.accuracy < 1e-6
    assert torch.allclose(end.theta, want, atol=1e-5)
    assert float(tv(end.log_law, r.log_law(want.log_softmax(-1)))) <= end.accuracy + 1e-7


@pytest.mark.slow
def test_a_rest_on_a_tie_that_is_alone_is_no_rest_of_many() -> None:
    solution, loss = _solution(3, 1), _above(1, 8.0)
    found = audit_loss(loss, solution, "distillation", beyond=False)
    want = _least(_flow(loss, solution).teacher[0], 1, 8.0)
    assert len(want.unique()) == 2
    assert found.how == "flow, along a kink"
    assert found.accuracy < 1e-6
    assert float(tv(found.log_laws[0], want.log_softmax(0))) <= found.accuracy + 1e-7


def _top(count: int) -> Loss:
    """Forward KL on the student's likeliest tokens, as if there were no others."""

    def loss(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        best = student.topk(count, dim=-1).indices
        own, taught = (x.gather(-1, best).log_softmax(-1) for x in (student, teacher))
        return ((taught.exp() * (taught - own)).sum(-1) * mask).sum() / mask.sum()

    return loss


def _by_steps(taught: list[float], start: list[float], count: int, length: float) -> list[float]:
    """Logits of one state where tiny steps end."""
    z = list(start)
    for _ in range(int(60 / length)):
        best = sorted(range(len(z)), key=lambda a: -z[a])[:count]
        top = max(z[a] for a in best)
        weights = [math.exp(z[a] - top) for a in best]
        want = [math.exp(taught[a]) for a in best]
        for a, w, t in zip(best, weights, want, strict=True):
            z[a] += length * (t / sum(want) - w / sum(weights))
    return z


@pytest.mark.slow
@pytest.mark.parametrize(("count", "actions"), [(2, 4), (3, 4)])
def test_a_students_top_is_followed_to_the_end(count: int, actions: int) -> None:
    solution = _solution(actions, 1, seed=3)
    found = audit_loss(_top(count), solution, "distillation", beyond=False)
    flow = _flow(_top(count), solution)
    taught, start = flow.teacher[0].tolist(), flow.responses.start[0].tolist()
    laws = [
        torch.tensor(_by_steps(taught, start, count, h)).double().log_softmax(0)
        for h in (1e-3, 5e-4)
    ]
    assert found.accuracy < 1e-5
    assert found.how.endswith("to one rest of many")
    own = float(tv(*laws))
    assert own < 1e-3
    assert float(tv(found.log_laws[0], laws[1])) <= found.accuracy + 2 * own


@pytest.mark.slow
@pytest.mark.parametrize("actions", [4, 7])
@pytest.mark.parametrize("loss", [_top(2), top_two])
def test_from_a_uniform_start_the_top_two_end_in_the_teachers_ratio(
    loss: Loss, actions: int
) -> None:
    """And all others beside the second of them, which went down until it stood as the teacher's."""
    space = TokenSpace(actions, 2)
    reward = torch.randn(actions**2, generator=torch.Generator().manual_seed(7)).double()
    solution = solve(EBM(space, reward, beta=0.5))
    found = audit_loss(loss, solution, "distillation", beyond=False)
    table = reward.view(actions, actions) / 0.5
    taught = torch.cat([table.logsumexp(1)[None], table])
    second = taught.topk(2).values[:, 1:]
    log_pi = torch.where(taught > second, taught, second).log_softmax(-1)
    want = (log_pi[0][:, None] + log_pi[1:]).flatten()
    assert found.accuracy < 1e-5
    assert found.how == "flow, along a kink, to one rest of many"
    assert float(tv(found.log_laws[0], want)) <= found.accuracy + 1e-7
    assert found.is_target is False


def _tiny_steps(taught: Tensor, length: float) -> Tensor:
    """log pi where tiny steps from a uniform one end, at each row of a teacher's logits."""
    z = torch.zeros_like(taught)
    mask = torch.ones(len(z), 1, dtype=torch.bool)
    for _ in range(int(100 / length)):
        z.requires_grad_()
        loss = either_top_two(z[:, None], taught[:, None], mask.long(), mask) * len(z)
        z = (z - length * torch.autograd.grad(loss, z)[0]).detach()
    return z.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["alone", "1", "3"])
def test_among_many_that_meet_at_once_the_right_ones_are_held(case: str) -> None:
    """From a uniform start all stand as one: who stands in the top two changes many times a nat.

    "alone" is a state of `random` at A = 8, T = 4, where one of six is to be let go as they meet.
    """
    if case == "alone":
        big = solve(make_task("random", vocab_size=8, max_length=4, beta=1.0, reference="uniform"))
        space, score = TokenSpace(8, 1), _flow(either_top_two, big).teacher[35]
    else:
        space = TokenSpace(8, 2)
        score = torch.randn(64, generator=torch.Generator().manual_seed(int(case))).double()
    flow = _flow(either_top_two, solve(EBM(space, score, beta=1.0)))
    end = followed_on_ties(alone(flow), flow.responses.start.clone())
    assert end is not None
    assert end.accuracy < 1e-5
    coarse, fine = (flow.responses.log_law(_tiny_steps(flow.teacher, h)) for h in (8e-3, 4e-3))
    own = float(tv(coarse, fine)) + 4e-3 / 4  # a step, of at most half a nat by its length
    assert own < 2e-3
    assert float(tv(end.log_law, fine)) <= own


def _elsewhere(student: Tensor, *_: Tensor) -> Tensor:
    """Its kink is where the second logit is 1 above the first."""
    return (student[..., 1] - student[..., 0] - 1).abs().mean()


def _in_float32(weight: float) -> Loss:
    def loss(student: Tensor, teacher: Tensor, *rest: Tensor) -> Tensor:
        return _above(1, weight)(student.float(), teacher.float(), *rest).double()

    return loss


def test_what_is_no_tie_is_left_to_others() -> None:
    for loss in (_elsewhere, _in_float32(3.0), _in_float32(8.0)):
        flow = _flow(loss, _solution(3, 1))
        assert followed_on_ties(alone(flow), flow.responses.start) is None
