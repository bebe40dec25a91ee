r"""Where an expected gradient leads: the flow in the space of one logit for each state and action.

First the flow itself, d theta / dt = -F(theta), from where it starts (Bogacki and Shampine 1989,
steps by their error). It decides what the limit is where there are several, and who survives; but
what is rarely visited moves as rarely, and it would take forever to come to rest. So it is
followed until its direction is plain, and then what moves is each logit in units of how often its
action is drawn,

    d theta(s, a) / dt = D(s, a) = -F(s, a) / (mass of (s, a)),

which is at rest where F is, turns no logit's sign, and gets there exponentially: a rest is reached
to the last digits, and an action that dies does so in a few steps. An action is dead where it has
become rarer than exp(-40) of its state and D goes on to push it down. Some losses push an action
the less the rarer it is (sigmoids that saturate), and would take forever: what is rare and still
falls when D hardly does is made that rare, and is dead if it is that rare at the rest that
follows. And where others draw, what only dead actions lead to goes on to move, and is no part of
the law: after a while a rest is one of what is left, and what still falls when it is rarer than all
accuracy is dead as well. Where no step is short enough, it slides along a kink, as fixed steps do;
but for states that do not see each other, of which :mod:`rl_ebm.studies.losses.way` follows each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.flow import (
    FAR,
    GONE,
    Direction,
    Field,
    Limit,
    Marks,
    direction,
    finished,
    step,
)
from rl_ebm.studies.losses.responses import normalised
from rl_ebm.studies.losses.slide import slide
from rl_ebm.studies.losses.visits import alone_of

FLOW_STEPS = 150
"""steps of the flow itself, at most, and"""
LEAST = 1
"""at least, where a step costs much:"""
WORK = 30_000_000
"""rows that a loss is given in them"""
TRIED = 2
"""as many may be tried, since a kink shortens each; and"""
FIRST = 40
"""at least"""
STEPS = 1500
"""steps to a rest, and"""
MOST = 6000
"""where each :data:`PATIENCE` of them leave less of D than"""
FEWER = 0.8
HELPED = 4
"""of these before the first attempt to get there at once, later ones ever further apart; with"""
MIXED = 60
"""evaluations and"""
MEMORY = 8
"""of them mixed"""
REST = 1e-12
"""of the size of D at the start, what rounding leaves of it"""
PLAIN = 1e-3
"""the same, where the flow is near its rest"""
STALLED = 1e-8
"""the same, where rounding leaves more: rewards that are small beside log-probabilities, in"""
LONG = 200
"""steps"""
FALLING = -5.0
"""log pi below which what is still pushed down is made to die, where D is not halved in"""
PATIENCE = 300
"""steps"""
FADED = -20.0
"""log pi below which what still falls then is as good as dead, if the law moves by no more than"""
UNSEEN = 1e-8
"""in total variation"""
ROUGH_REST = 1e-5
"""in a loss that leaves float64"""
NEARLY = 1e-4
"""of D, the most that a rest found at once may leave"""
NOTHING = 1e-2
"""in units of the loss's own gradients, more than rounding to float32 leaves of 0"""
UNALIKE = 0.25
"""of D that changes with any step of"""
NEARBY = 1e-6
"""nats, where D is rounding alone"""


def _plain_flow(flow: Field, theta: Tensor, unit: float, steps: int) -> Tensor:
    """The flow itself, until its direction is plain or its steps are used up."""

    def f(x: Tensor) -> Tensor:
        return -flow.field(x)[0]

    first = f(theta)
    h = 1e-2 / max(float(first.abs().max()), 1e-300)
    steps = max(LEAST, min(steps, WORK // (3 * flow.cost)))
    left = max(FIRST, TRIED * steps)
    for i in range(steps):
        error = math.inf
        while error > 1e-3 and left > 0:
            new, errors, last = step(f, theta, first, h)
            error, left = float(errors.abs().max()), left - 1
            if error > 1e-3:
                h *= max(0.2, 0.9 * (1e-3 / error) ** (1 / 3)) if math.isfinite(error) else 0.2
        if error > 1e-3:
            break
        theta, first = new, last
        h *= min(4.0, 0.9 * (1e-3 / max(error, 1e-300)) ** (1 / 3))
        if i % 10 == 9 and direction(flow, theta).size <= PLAIN * unit:
            break
    return theta


def limit_from(
    flow: Field,
    theta: Float[Tensor, "S A"],
    rough: bool = False,
    plain: int = FLOW_STEPS,
    along: Callable[[Field, Tensor], Limit] | None = None,
) -> Limit:
    """Where the flow leads from some logits.

    Args:
        rough: whether the loss computes in float32.
        plain: steps of the flow itself, at most.
        along: goes on at a kink; None for :func:`at_kink`.

    Raises:
        LossError: a loss that is NaN or infinite on the way.
    """
    theta = theta.masked_fill(torch.isneginf(flow.responses.start), 0.0)
    begin = direction(flow, theta)
    unit = float(begin.value.abs().max())
    rest = ROUGH_REST if rough else REST
    if unit <= 1e-11 or (rough and _rounded(flow, theta, begin.value)):
        return finished(flow, theta, begin, unit)
    theta = _plain_flow(flow, theta, unit, plain)
    return rest_at_once(flow, theta, unit, rest) or rest_from(
        flow, theta, unit, rest, along=along or at_kink
    )


def _rounded(flow: Field, theta: Tensor, value: Tensor) -> bool:
    """Whether D of a loss in float32 is what rounding leaves of 0: another one at each place.

    Terms may cancel in the mean over what is drawn: a baseline alone, say.
    """
    if float(value.abs().max()) > NOTHING:  # a kink also makes it another one at each place
        return False
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        shift = NEARBY * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        changed = (direction(flow, theta + shift).value - value).abs().max()
        if float(changed) < UNALIKE * float(value.abs().max()):
            return False
    return True


def rest_at_once(
    flow: Field, theta: Tensor, unit: float, rest: float, kinks_within: float | None = None
) -> Limit | None:
    """A rest by a method of the kind's own: a smooth one, or where kinks meet; None if it fails.

    Args:
        kinks_within: nats to where kinks meet, if they do: a smooth one is not looked for then.
    """
    if kinks_within is not None:
        return _where_kinks_meet(flow, theta, kinks_within)
    if flow.kinks_first:
        return _where_kinks_meet(flow, theta) or _smooth_rest(flow, theta, unit, rest)
    return _smooth_rest(flow, theta, unit, rest) or _where_kinks_meet(flow, theta)


def _smooth_rest(flow: Field, theta: Tensor, unit: float, rest: float) -> Limit | None:
    near = flow.rest_near(theta, rest * min(unit, 1.0))
    if near is None:
        return None
    theta, off = near
    now = direction(flow, theta)
    if now.size > min(1e3 * rest, NEARLY) * unit:
        return None
    end = finished(flow, theta, now, now.size, unit)
    return replace(end, accuracy=max(end.accuracy, off))


def _where_kinks_meet(flow: Field, theta: Tensor, within: float = math.inf) -> Limit | None:
    found = flow.rest_on_kinks(theta, within)
    if found is None:
        return None
    theta, off = found
    return replace(finished(flow, theta, direction(flow, theta), off), kink=True)


def at_kink(flow: Field, theta: Tensor) -> Limit:
    """At a kink: a slide, or its place for states that :mod:`rl_ebm.studies.losses.way` follows."""
    if alone_of(flow, theta) is None:
        return slide(flow, theta)
    r = flow.responses
    law, lost = r.log_law(normalised(theta, r.start)), direction(flow, theta).lost
    return Limit(theta, law, lost, 1.0, kink=True, ahead=True)


def stopped(flow: Field, theta: Tensor) -> Limit:
    """Where it stands at a kink, which is no end."""
    law = flow.responses.log_law(normalised(theta, flow.responses.start))
    return Limit(theta, law, torch.zeros_like(theta, dtype=torch.bool), math.inf, kink=True)


def rest_from(
    flow: Field,
    theta: Tensor,
    unit: float,
    rest: float,
    bury: bool = True,
    along: Callable[[Field, Tensor], Limit] = slide,
) -> Limit:
    """A rest, by steps whose error is small beside what they move; ``along`` goes on at a kink."""
    seen = [direction(flow, theta)]

    def f(x: Tensor) -> Tensor:
        seen[:] = [direction(flow, x)]
        return seen[0].value

    now = seen[0]
    h, before, helped = 0.1 / max(now.size, 1e-300), math.inf, HELPED
    marks, patience = Marks(flow.responses), _Patience()
    for i in range(MOST):
        size = now.size
        marks.see(size, theta)
        if not patience.left(i, size):
            break
        if i >= PATIENCE and bool(now.lost.any()):
            size = now.left(flow.responses).size
        if size <= rest * unit or (i >= LONG and size <= STALLED * unit):
            return marks.known(finished(flow, theta, now, size, unit), size)
        if bury and i % PATIENCE == PATIENCE - 1:
            end = None
            if size > before / 2:
                end = _faded(flow, theta, now, unit) or _buried(flow, theta, now, unit, rest)
            if end is not None:
                return end
            bury, before = size <= before / 2, size
        if i >= helped and not bool(now.lost.any()):
            helped = max(i + HELPED, i * 5 // 4)
            found = _accelerated(flow, theta, now, h / 2, rest * unit)
            if found is not None:
                return marks.known(finished(flow, *found, rest * unit, unit), rest * unit)
        counts = now.alive & ~(now.value < -1e3 * unit)
        h = min(h, 1.0 / max(float(now.value[counts].abs().max()), 1e-300)) if counts.any() else h
        for _ in range(40):
            new, errors, _ = step(f, theta, now.value, h)
            error = float(errors[counts].abs().max()) if counts.any() else 0.0
            allowed = 0.05 * h * size
            if error <= allowed:
                break
            h *= max(0.2, 0.8 * (allowed / error) ** 0.5) if math.isfinite(error) else 0.2
        else:
            if size <= STALLED * unit:
                return marks.known(finished(flow, theta, now, size, unit), size)
            return along(flow, theta)
        if h * size < 1e-9 * min(unit, 1.0) and size > 1e-6 * unit:
            return along(flow, theta)
        theta, now = new, seen[-1]  # the last that was looked at is the end of the step
        h *= min(3.0, 0.8 * (allowed / max(error, 1e-300)) ** 0.5)
    if now.size <= 1e-6 * unit:
        return marks.known(finished(flow, theta, now, now.size, unit), now.size)
    log_law = flow.responses.log_law(normalised(theta, flow.responses.start))
    return _faded(flow, theta, now, unit) or Limit(theta, log_law, now.lost, math.inf)


@dataclass
class _Patience:
    """Whether it is worth going on."""

    looked: float = math.inf

    def left(self, i: int, size: float) -> bool:
        """After so many steps, with a D of this size."""
        if i % PATIENCE:
            return True
        before, self.looked = self.looked, size
        return i < STEPS or size <= FEWER * before


def _faded(flow: Field, theta: Tensor, now: Direction, unit: float) -> Limit | None:
    """The rest without what is nearly dead and falls ever slower; None where the law still moves.

    Where nothing is dead yet, what fades may be alive, and too rare.
    """
    r = flow.responses
    log_pi = normalised(theta, r.start)
    mean = (log_pi.exp() * now.value).sum(1, keepdim=True)
    fading = now.alive & (log_pi < FADED) & (now.value < mean)
    left = replace(now, lost=now.lost | fading, alive=now.alive & ~fading).left(r)
    if not bool(fading.any()) or left.size > STALLED * unit:
        return None
    end = finished(flow, theta, left, left.size, unit)
    moved = float(tv(end.log_law, r.log_law(log_pi)))
    if moved > UNSEEN:
        return None
    return replace(end, accuracy=max(end.accuracy, moved), faint=not bool(now.lost.any()))


def _buried(flow: Field, theta: Tensor, now: Direction, unit: float, rest: float) -> Limit | None:
    """The rest without the rare actions that still fall; None where there are none, or they rise.

    They would take forever. So they are made as rare as the dead, and the rest that follows counts
    if it leaves them there.
    """
    log_pi = normalised(theta, flow.responses.start)
    mean = (log_pi.exp() * now.value).sum(1, keepdim=True)
    falling = now.alive & (log_pi < FALLING) & (now.value < mean)
    if not bool(falling.any()):
        return None
    theta = theta + (GONE - 1 - log_pi).clamp(max=0.0).masked_fill(~falling, 0.0)
    end = rest_from(flow, theta, unit, rest, bury=False)
    if not end.settled:
        return None
    gone = end.dead | (normalised(end.theta, flow.responses.start) <= GONE + 1)
    return None if bool((falling & ~gone).any()) else end


def _accelerated(
    flow: Field, theta: Tensor, now: Direction, h: float, rest: float
) -> tuple[Tensor, Direction] | None:
    """The rest nearby, by Anderson's mixing (1965) of steps of one length; None where it fails.

    It may not leave: D falls from step to step, but for a factor, and no action dies.
    """
    points: list[Tensor] = []
    moves: list[Tensor] = []
    best = now.size
    for _ in range(MIXED):
        points.append(theta[now.alive])
        moves.append(h * now.value[now.alive])
        points, moves = points[-MEMORY:], moves[-MEMORY:]
        new = points[-1] + moves[-1]
        if len(points) > 1:
            dx, df = (torch.stack(x, 1).diff(dim=1) for x in (points, moves))
            mixing = torch.linalg.lstsq(df, moves[-1][:, None], driver="gelsd").solution
            new = new - ((dx + df) @ mixing)[:, 0]
        if float((new - points[-1]).abs().max()) > FAR:
            return None
        before = now
        theta = theta.masked_scatter(now.alive, new)
        try:
            now = direction(flow, theta)
        except LossError:
            return None
        if bool((now.alive != before.alive).any()) or now.size > 3 * best:
            return None
        best = min(best, now.size)
        if now.size <= rest:
            return theta, now
    return None
