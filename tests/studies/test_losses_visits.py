"""Whether states see each other, and how each moves where they do not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loss_cases import alone
from torch import Tensor
from torch.nn.functional import relu

from rl_ebm import EBM, TokenSpace, solve
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.distillation import Distillation
from rl_ebm.studies.losses.flow import Field
from rl_ebm.studies.losses.preference import Pairs
from rl_ebm.studies.losses.visits import alone_of, few_of, over_visits

Loss = Callable[..., Tensor]


def _flow(
    loss: Loss,
    actions: int = 3,
    steps: int = 3,
    eos: int | None = None,
    kind: str = "distillation",
    sampler: str | float | None = None,
    pairs: Pairs | None = None,
) -> Field:
    space = TokenSpace(actions, steps, eos_id=eos)
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.randn(space.num_prefixes(t), actions, generator=generator).double()
        for t in range(steps)
    ]
    reward = torch.randn(space.num_sequences, generator=generator).double()
    solution = solve(EBM(space, reward, beta=0.5, reference=Tabular.from_tables(tables, space)))
    (case,) = cases_of(asked(loss, kind, "centred", sampler, None, 1, None, pairs), solution)
    return case.flow


def _distillation(loss: Loss, steps: int = 3, eos: int | None = None) -> Distillation:
    flow = _flow(loss, 3, steps, eos)
    assert isinstance(flow, Distillation)
    return flow


def _gap(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """How far the student's log pi of what was drawn is from the teacher's."""
    both = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (student, teacher))
    own, taught = both
    return own - taught


def _near(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the logits alone, at each token."""
    return (student - teacher).square().sum(-1) / 2 + student.amax(-1)


def own_logits(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return (_near(student, teacher) * mask).sum() / mask.sum()


def own_logits_of_rows(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return ((_near(student, teacher) * mask).sum(1) / mask.sum(1)).mean()


def own_token(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return (_gap(student, teacher, tokens).square() * mask).sum(1).mean()


def own_token_of_rows(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return ((_gap(student, teacher, tokens).square() * mask).sum(1) / mask.sum(1)).mean()


def in_float32(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return own_logits(student.float(), teacher.float(), tokens, mask).double()


def of_whole(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return (_gap(student, teacher, tokens) * mask).sum(1).square().mean()


def of_what_came_before(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """All rows that pass a state give it the same, of the logits of the states on the way there."""
    gap = _gap(student, teacher, tokens) * mask
    return (gap * gap.detach().cumsum(1)).sum(1).mean()


def _both_means(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    near = _near(student, teacher) * mask
    return near.sum(1).mean() + 3 * near.square().sum() / mask.sum()


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize(
    ("loss", "apart", "few"),
    [
        (own_logits, True, True),
        (own_logits_of_rows, True, True),
        (own_token, True, False),
        (own_token_of_rows, (True, False), False),
        (in_float32, True, None),
        (of_whole, False, None),
        (of_what_came_before, False, None),
        (_both_means, (True, False), True),
    ],
)
def test_whether_states_see_each_other_is_found(
    loss: Loss, apart: bool | tuple[bool, bool], few: bool | None, eos: int | None
) -> None:
    """Where lengths differ, a mean over a row's tokens looks ahead: how long will it be?"""
    flow = _flow(loss, eos=eos)
    found = alone_of(flow, flow.responses.start)
    want = apart if isinstance(apart, bool) else apart[eos is not None]
    assert (found is not None) is want
    if found is not None and few is not None:
        assert (found.cost < flow.cost) is few


@pytest.mark.parametrize(("sampler", "apart"), [(1.0, True), (0.0, True), (0.5, False)])
def test_which_law_drew_a_token_hangs_on_those_before(sampler: float, apart: bool) -> None:
    for loss, want in ((own_token, apart), (own_logits, True)):
        flow = _flow(loss, sampler=sampler)
        assert (alone_of(flow, flow.responses.start) is not None) is want


def test_of_two_tokens_the_direction_says_nothing() -> None:
    """A gradient of two logits has one direction, in which it is hard to see who stops it."""

    def whole(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return relu(1 - _gap(student, teacher, tokens).sum(1)).mean()

    def hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return relu(1 - ((x - u) - (y - v))).mean()

    def paid(p: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return -((p - old).exp() * advantages * mask).sum(1).mean()

    for flow in (
        _flow(whole, 2, 2),
        _flow(hinge, 2, 2, kind="preference", pairs=Pairs("higher")),
        _flow(paid, 2, 2, kind="policy-gradient"),
    ):
        assert alone_of(flow, flow.responses.start) is None


def test_what_states_do_to_each_other_is_looked_for_where_the_way_ends() -> None:
    """Far from there the whole is a sum over its states."""

    def far(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        first = student[..., 0] - student[..., 1]
        return relu(60 - first.sum(1)).mean()

    flow = _flow(far, 2, 2)
    start = flow.responses.start
    assert alone_of(flow, start) is not None
    assert alone_of(flow, torch.tensor([[30.0, 0.0]]).double().expand_as(start)) is None


@pytest.mark.parametrize("eos", [None, 0])
def test_a_few_rows_pass_all_states(eos: int | None) -> None:
    r = _flow(own_logits, eos=eos).responses
    few = few_of(r.states, r.mask, len(r.start))
    reached = {int(s) for row, m in zip(r.states, r.mask, strict=True) for s in row[m]}
    assert {i for i, x in enumerate(few.passed.tolist()) if x} == reached
    for state in reached:
        row, step = few.rows[few.row[state]], few.step[state]
        assert int(r.states[row, step]) == state
        assert bool(r.mask[row, step])
    last = {int(row[m][-1]) for row, m in zip(r.states, r.mask, strict=True)}
    assert len(few.rows) <= len(last)


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize("loss", [own_logits, own_logits_of_rows, own_token])
def test_what_a_visit_does_is_the_field_over_the_visits(loss: Loss, eos: int | None) -> None:
    """But for how fast each state's clock goes."""
    flow = _distillation(loss, eos=eos)
    noise = torch.randn(flow.responses.start.shape, generator=torch.Generator().manual_seed(1))
    theta = flow.responses.start + noise.double()
    want, found = over_visits(*flow.field(theta)), alone(flow).per_visit(theta)
    assert want.abs().max() > 0.1
    clocks = (want * found).sum(1) / found.square().sum(1).clamp(min=1e-290)
    assert bool(((clocks > 0.01) | (want.abs().amax(1) == 0)).all())
    assert torch.allclose(clocks[:, None] * found, want, atol=1e-12)


def test_a_state_that_nobody_visits_does_not_move() -> None:
    flow = _distillation(own_logits, 2)
    drawn = flow.responses.start.clone()
    drawn[0, 1] = -torch.inf
    moved = alone(replace(flow, drawn=drawn)).per_visit(flow.responses.start)
    assert [bool(x.any()) for x in moved] == [True, True, False, True]
