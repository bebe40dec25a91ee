"""Tokens that a kink holds: policy gradients with |log pi - log p_ref|, whose rests are known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.held import _Way, rest_held
from rl_ebm.studies.losses.policy_gradient import PolicyGradient

BETA = 0.5
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Penalty = Callable[[Tensor, Tensor], Tensor]


def _with(penalty: Penalty) -> Loss:
    def loss(log_pi: Tensor, old: Tensor, log_ref: Tensor, gain: Tensor, mask: Tensor) -> Tensor:
        each = -(log_pi - old.detach()).exp() * gain + BETA * penalty(log_pi, log_ref)
        return (each * mask).sum(1).mean()

    return loss


absolute = _with(lambda x, u: (x - u).abs())


def _problem(actions: int, steps: int, seed: int) -> tuple[Tensor, list[Tensor], Solution]:
    """R, (A,) * T; log p_ref of each position, (A ** t, A); and the EBM, solved."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(actions**steps, generator=generator).double()
    space = TokenSpace(actions, steps)
    tables = [torch.randn(actions**t, actions, generator=generator).double() for t in range(steps)]
    log_ref = [table.log_softmax(1) for table in tables]
    reference = Tabular.from_tables(tables, space)
    return reward, log_ref, solve(EBM(space, reward, beta=BETA, reference=reference))


def _held_at(q: Tensor, log_ref: Tensor) -> Tensor:
    """The policy at one state where the gradient of -Q + beta |log pi - log p_ref| leaves nothing.

    An action that is not at its place has the penalty's whole slope, so that but for chance there
    is one such, and above, since what is left of 1 is more than its own share: that of the highest
    Q. Another's slope makes up for a difference of 2 beta, and it is held; or not, and it dies.
    """
    best = int(q.argmax())
    held = (q[best] - q) < 2 * BETA
    p = torch.where(held, log_ref.exp(), 0.0)
    p[best] = 0.0
    p[best] = 1 - p.sum()
    return p


def _law_of(reward: Tensor, log_ref: list[Tensor]) -> Tensor:
    """The same at every state, from the last to the first: no state sees those before it."""
    q, tables = reward, []
    for table in reversed(log_ref):
        q = q.view(table.shape)
        p = torch.stack([_held_at(*state) for state in zip(q, table, strict=True)])
        tables.append(p)
        q = (p * q).sum(1)
    law = torch.ones(1).double()
    for p in reversed(tables):
        law = (law[:, None] * p).flatten()
    return law.log()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("actions", "steps", "seed"), [(4, 2, 0), (3, 3, 1), (5, 1, 2), (2, 4, 4), (8, 3, 0)]
)
@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_it_rests_with_what_the_penalty_holds(
    actions: int, steps: int, seed: int, factor: float
) -> None:
    reward, log_ref, solution = _problem(actions, steps, seed)
    found = audit_loss(lambda *x: factor * absolute(*x), solution, beyond=False)
    law = _law_of(reward, log_ref)
    assert int((law > -torch.inf).sum()) > 1
    assert found.log_laws is not None
    assert float(tv(found.log_laws[0], law)) < 1e-9
    assert found.accuracy < 1e-9
    assert found.how == "flow, along a kink"


def _by_euler(reward: Tensor, log_ref: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """One state, by tiny steps of its own log pi; a sign at 0 is looked at as 0."""
    log_pi, length = log_ref.clone(), 2e-3
    total, count = torch.zeros_like(log_pi), 0
    for i in range(20_000):
        p = log_pi.exp()
        h = -reward + BETA * slope(log_pi - log_ref)
        log_pi = (log_pi + length * ((p * h).sum() - h)).log_softmax(0)
        if i >= 15_000:
            total, count = total + log_pi.exp(), count + 1
    return total / count


def test_where_it_rests_at_once() -> None:
    reward, log_ref, solution = _problem(3, 2, 1)
    flow = _flow(absolute, solution)
    end = rest_held(flow, flow.responses.start)
    assert end is not None
    law = _law_of(reward, log_ref)
    assert int((law > -torch.inf).sum()) > 1
    assert float(tv(end.log_law, law)) < 1e-9
    assert end.accuracy < 1e-9


@pytest.mark.slow
def test_two_places_of_a_token_with_a_zone_between_them() -> None:
    """Nothing is charged within 0.3 nats of the reference."""
    reward = torch.tensor([0.8, 0.55, 0.1, -1.6], dtype=torch.float64)
    _, (log_ref,), _ = _problem(4, 1, 5)
    space = TokenSpace(4, 1)
    reference = Tabular.from_tables([log_ref], space)
    solution = solve(EBM(space, reward, beta=BETA, reference=reference))
    loss = _with(lambda x, u: relu((x - u).abs() - 0.3))
    found = audit_loss(loss, solution, beyond=False)
    want = _by_euler(reward, log_ref[0], lambda x: torch.where(x.abs() > 0.3, x.sign(), 0.0))
    assert found.log_laws is not None
    assert float((found.log_laws[0].exp() - want).abs().max()) < 5e-3
    at = (found.log_laws[0] - log_ref[0]).abs() - 0.3
    assert int((at.abs() < 1e-9).sum()) >= 1  # exactly, which small steps do not get
    assert found.accuracy < 1e-9


def _flow(loss: Loss, solution: Solution, inner: int = 1) -> PolicyGradient:
    what = asked(loss, "policy-gradient", "centred", None, None, inner, None, None)
    (case,) = cases_of(what, solution)
    assert isinstance(case.flow, PolicyGradient)
    return case.flow


def _summed(log_pi: Tensor, old: Tensor, log_ref: Tensor, gain: Tensor, mask: Tensor) -> Tensor:
    """It jumps where the sum over a response does, whatever one of its tokens is."""
    far = ((log_pi - log_ref) * mask).sum(1).abs()
    return (BETA * far - ((log_pi - old.detach()).exp() * gain * mask).sum(1)).mean()


def _pushed_away(
    log_pi: Tensor, old: Tensor, log_ref: Tensor, gain: Tensor, mask: Tensor
) -> Tensor:
    return -absolute(log_pi, old, log_ref, -gain, mask)


def _smooth(log_pi: Tensor, old: Tensor, log_ref: Tensor, gain: Tensor, mask: Tensor) -> Tensor:
    return _with(lambda x, u: (x - u).square())(log_pi, old, log_ref, gain, mask)


def _way(loss: Loss) -> _Way:
    _, _, solution = _problem(3, 2, 0)
    flow = _flow(loss, solution)
    return _Way(flow, flow.responses.start)


@pytest.mark.parametrize("loss", [_summed, _smooth])
def test_what_jumps_at_no_place_of_a_token_is_left_to_others(loss: Loss) -> None:
    way = _way(loss)
    assert not way.look()
    assert rest_held(way.flow, way.log_pi) is None


def test_what_is_pushed_away_from_a_place_is_left_to_others() -> None:
    way = _way(_pushed_away)
    assert way.look()
    assert way.motion() is None
    assert rest_held(way.flow, way.log_pi) is None


def test_what_is_let_go_and_pushed_back_is_held_again() -> None:
    """Let go on the side that pushes it to its place, which no step would have done."""
    way = _way(absolute)
    assert way.look()
    now = way.motion()
    assert now is not None
    low, high = way.sides()
    held = way._here() & (way.side == 0) & (now.velocity == 0) & (low < high)
    state, action = held.nonzero()[0].tolist()
    way.side[state, action] = 1
    pushed = way.motion()
    assert pushed is not None
    assert float(pushed.velocity[state, action]) < 0
    assert way._turn(pushed)
    assert int(way.side[state, action]) == 0
    again = way.motion()
    assert again is not None
    assert float(again.velocity[state, action]) == 0


def _summed_later(
    log_pi: Tensor, old: Tensor, log_ref: Tensor, gain: Tensor, mask: Tensor
) -> Tensor:
    """At the start only tokens' own jumps are near; a response's comes when it is half as likely"""
    far = ((log_pi - log_ref) * mask).sum(1) + 0.7
    return absolute(log_pi, old, log_ref, gain, mask) + BETA * far.abs().mean()


def test_a_jump_on_the_way_that_is_no_tokens_own_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: it went on for 4,000 steps that moved nothing."""
    asked_for, given = [], _Way.given

    def counted(self: _Way, read: Tensor) -> Tensor:
        asked_for.append(read)
        return given(self, read)

    monkeypatch.setattr(_Way, "given", counted)
    way = _way(_summed_later)
    assert way.look()
    assert way.end() is None
    assert len(asked_for) < way.steps / 2


def test_several_steps_on_a_batch_are_left_to_others() -> None:
    _, _, solution = _problem(3, 2, 0)
    flow = _flow(absolute, solution, inner=2)
    assert rest_held(flow, flow.responses.start) is None
    once = _flow(absolute, solution)
    end = rest_held(once, once.responses.start)
    assert end is not None
    assert math.isclose(float(end.log_law.exp().sum()), 1.0, rel_tol=1e-12)
