r"""Limits that the way decides: rests that are not alone.

A loss that is flat somewhere (a hinge whose margins are all kept) has rests beside each rest, and
each way down ends at another. The steps of :mod:`rl_ebm.studies.losses.limit` take a shorter way
than the flow, d theta / dt = -F(theta), to the same rest where there is one. So a rest is pushed
aside a little, along what has moved: where it does not come back, the flow itself is followed to
its end, twice, with steps of two lengths where a kink leaves no other choice; states that do not
see each other by themselves: along ties that hold, :mod:`rl_ebm.studies.losses.ties`, or about what
kinks there are, :mod:`rl_ebm.studies.losses.apart`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.studies.losses.apart import followed_apart
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.flow import GONE, Field, Limit, direction, step, to_go
from rl_ebm.studies.losses.limit import REST, ROUGH_REST, rest_at_once, rest_from
from rl_ebm.studies.losses.responses import normalised
from rl_ebm.studies.losses.slide import slide
from rl_ebm.studies.losses.ties import followed_on_ties
from rl_ebm.studies.losses.visits import Alone, alone_of

ASIDE = 1e-2
"""nats that a rest is pushed, and"""
BACK = 1e-3
"""of the way that it may stay off, of a rest that is alone; and where rounding to float32 moves a
rest by some 1e-5,"""
ROUGH_ASIDE, ROUGH_BACK = 0.1, 1e-2
CREEPS = 1e-3
"""accuracy of an end that is none"""
TWICE, NEARER = 2, 0.1
"""times it is tried, then with what the first came to, if that is so much nearer than the push"""
FURTHER = 0.3
"""nats that a rest at kinks is pushed, and"""
THERE = 0.1
"""of the way that it may stay off, of a rest that is alone"""
NEAR = 1e-5
"""nats that have not moved"""
LENGTHS = (4e-2, 2e-2)
"""nats of a step of the flow, at the rate of its first, that its error does not shorten"""
ERROR = 1e-3
"""the same, of its error otherwise"""
APART_LENGTHS = (2e-2, 1.4e-2, 1e-2)
"""the same, of states that do not see each other"""
HELD = 1e-4
"""accuracy of an end along ties that hold, which is more where it hangs on what is no event"""
CHANCE = 2.0
"""times the largest difference of their ends: about kinks a length is off as if by chance"""
STEPS = 5000
"""of those, at most; fewer where they cost more:"""
WORK = 100_000_000
"""rows that the loss is given in them"""
WINDOW = 200
"""steps whose mean law is looked at; it has ended where it is no more to go than"""
ENDED = 1e-5
"""in total variation"""
SLOW = 1e-6
"""of the size of D at the start, where a flow without kinks has ended"""
NOTHING = 1e-11
"""D of a start that is at rest"""


def decided(flow: Field, start: Float[Tensor, "S A"], end: Limit, rough: bool = False) -> Limit:
    """The same rest where it is alone; else the end of the flow itself, and how well it is known.

    Args:
        start: logits, where the flow began.
        rough: whether the loss computes in float32.
    """
    start = start.masked_fill(torch.isneginf(flow.responses.start), 0.0)
    unit = float(direction(flow, start).value.abs().max())
    if unit <= NOTHING or not end.settled:
        return end
    tried = end.ahead
    if tried:
        alone = _each_alone(flow, start, end, unit)
        if alone is not None:
            return alone
        end = slide(flow, end.theta)
    again = back(flow, start, end, unit, rough)
    if again is not None:
        return again
    (coarse, slid), (fine, slides) = (_followed(flow, start, length) for length in LENGTHS)
    off = float(tv(coarse.log_law, fine.log_law)) + fine.accuracy
    if not end.kink and not fine.kink and direction(flow, fine.theta).size > SLOW * unit:
        off += _creeps(flow, fine, unit)
    accuracy = min(1.0, max(end.accuracy, off))
    if (slid or slides) and not tried:  # to a rest beside the kink
        alone = (_each_alone if accuracy > CREEPS else _along_ties)(flow, start, end, unit)
        if alone is not None and alone.accuracy < accuracy:
            return alone
    return replace(fine, dead=end.dead, accuracy=accuracy, kink=end.kink or fine.kink, many=True)


def _each_alone(flow: Field, start: Tensor, end: Limit, unit: float) -> Limit | None:
    """Where states that do not see each other go, past a kink: each by its own clock.

    A rest to which they come back, from further than a kink makes them jump, is gone to from there.
    None where nothing has moved, where they creep, as beside a steep kink, where the loss fails on
    the way, or where they see each other.
    """
    apart = alone_of(flow, end.theta)
    if apart is None:
        return None
    try:
        held = _held(flow, apart, start)
        if held is not None:
            return replace(held, dead=end.dead)
        first = followed_apart(apart, start, APART_LENGTHS[0])
        if first.accuracy > CREEPS:
            return None
        ends = [first, *(followed_apart(apart, start, length) for length in APART_LENGTHS[1:])]
        fine = ends[-1]
        aside = _pushed(flow, start, fine, FURTHER)
        if aside is None:
            return None
        r = flow.responses
        there = THERE * float(tv(r.log_law(normalised(aside, r.start)), fine.log_law))
        again = followed_apart(apart, aside, APART_LENGTHS[0], max(ENDED, there / 4))
        if float(tv(again.log_law, fine.log_law)) <= there:
            last = rest_from(flow, fine.theta, unit, REST)
            if last.settled and float(tv(last.log_law, fine.log_law)) <= there:
                return last
    except LossError:
        return None
    off = max(float(tv(a.log_law, b.log_law)) for a, b in combinations(ends, 2))
    off = min(1.0, CHANCE * off + fine.accuracy)
    return replace(fine, dead=end.dead, accuracy=off, kink=True, many=True)


def _along_ties(flow: Field, start: Tensor, end: Limit, unit: float) -> Limit | None:
    """The same where ties hold all the way alone; None elsewhere."""
    apart = alone_of(flow, end.theta)
    try:
        return None if apart is None else _held(flow, apart, start)
    except LossError:
        return None


def _held(flow: Field, alone: Alone, start: Tensor) -> Limit | None:
    """Where ties lead that hold, and whether there is another rest beside it; None elsewhere."""
    end = followed_on_ties(alone, start)
    if end is None or end.accuracy > HELD:
        return None
    aside = _pushed(flow, start, end, FURTHER)
    again = None if aside is None else followed_on_ties(alone, aside)
    if aside is None or again is None:
        return end
    r = flow.responses
    there = THERE * float(tv(r.log_law(normalised(aside, r.start)), end.log_law))
    return replace(end, many=float(tv(again.log_law, end.log_law)) > there)


def back(
    flow: Field,
    start: Tensor,
    end: Limit,
    unit: float,
    rough: bool,
    along: Callable[[Field, Tensor], Limit] = slide,
) -> Limit | None:
    """The rest that comes back to itself when it is pushed aside; None where none does.

    What creeps comes back to a better one, further on, which is then pushed itself; and a kink may
    have been on the way alone.

    Args:
        unit: size of D where the flow began.
        along: goes on at a kink.
    """
    r, rest = flow.responses, ROUGH_REST if rough else REST
    nats, share = (ROUGH_ASIDE, ROUGH_BACK) if rough else (ASIDE, BACK)
    for _ in range(TWICE):
        aside = _pushed(flow, start, end, nats)
        if aside is None or (not end.dead.any() and flow.is_minimum(end.theta, end.kink)):
            return end
        away = float(tv(r.log_law(normalised(aside, r.start)), end.log_law))
        try:
            again = rest_at_once(flow, aside, unit, rest, nats if end.kink else None)
            again = again or rest_from(flow, aside, unit, rest, along=along)
        except LossError:
            return None
        off = float(tv(again.log_law, end.log_law))
        better = again.accuracy < end.accuracy if again.kink else end.kink
        if again.settled and off <= share * away + end.accuracy + again.accuracy:
            return again if better else end
        if again.accuracy >= end.accuracy or off > NEARER * away:
            return None
        end = again
    return None


def _pushed(flow: Field, start: Tensor, end: Limit, nats: float) -> Tensor | None:
    """Logits beside a rest; None where nothing has moved.

    Only what has moved is pushed: where a loss never looks there are rests beside each, and no way
    goes there.
    """
    r = flow.responses
    alive = ~torch.isneginf(end.theta)
    moved = normalised(end.theta, r.start) - normalised(start, r.start)
    share = moved.masked_fill(~alive, 0.0).abs().clamp(max=1.0)
    if float(share.max()) <= NEAR:
        return None
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(share.shape, generator=generator, dtype=torch.float64)
    return end.theta.masked_fill(~alive, GONE) + nats * noise * share


def _creeps(flow: Field, end: Limit, unit: float) -> float:
    """How far what moves ever less, as 1 / time, may still go: to the rest that is beside it."""
    try:
        rest = rest_from(flow, end.theta, unit, REST)
    except LossError:
        return 1.0
    return float(tv(rest.log_law, end.log_law)) + rest.accuracy if rest.settled else 1.0


def _followed(flow: Field, theta: Tensor, length: float) -> tuple[Limit, bool]:
    """The flow itself: steps by their error, and no shorter than a kink makes of it.

    Beside its end, whether there was a kink on the way.

    The law is the mean over a window of steps, which evens out what jumps about a kink; its
    accuracy is how far it is still to go.
    """
    r = flow.responses

    def f(x: Tensor) -> Tensor:
        return -flow.field(x)[0]

    first = f(theta)
    h = shortest = length / max(float(first.abs().max()), 1e-300)
    time, seen = 0.0, [(0.0, r.log_law(normalised(theta, r.start)))]
    left, kink, slid = 1.0, False, False
    for _ in range(max(4, min(STEPS, WORK // (3 * flow.cost)) // WINDOW)):
        mean, kink = torch.zeros(len(r.reward), dtype=torch.float64), False
        for _ in range(WINDOW):
            theta, first, taken, h, forced = _one_step(f, theta, first, h, shortest, ERROR * length)
            time, kink = time + taken, kink or forced
            mean += r.log_law(normalised(theta, r.start)).exp() / WINDOW
        slid = slid or kink
        seen.append((time, mean.log()))
        left = to_go(partial(_last_by, seen)) if bool(first.any()) else 0.0
        if left <= ENDED:
            break
    law = r.log_law(normalised(theta, r.start)) if left == 0.0 else seen[-1][1]
    return Limit(theta, law, torch.zeros_like(theta, dtype=torch.bool), left, kink), slid


def _one_step(
    f: Callable[[Tensor], Tensor],
    theta: Tensor,
    first: Tensor,
    h: float,
    shortest: float,
    allowed: float,
) -> tuple[Tensor, Tensor, float, float, bool]:
    """Where it leads, f there, its length and that of the next; whether a kink is in its way."""
    while True:
        new, errors, last = step(f, theta, first, h)
        error = float(errors.abs().max())
        if error <= allowed or h <= shortest:
            break
        h = max(shortest, h / 4)
    if not math.isfinite(error):  # the loss fails there
        return theta, first, 0.0, h, False
    longer = 0.9 * (allowed / max(error, 1e-300)) ** (1 / 3)
    return new, last, h, max(shortest, h * min(2.0, max(0.5, longer))), error > allowed


def _last_by(seen: list[tuple[float, Tensor]], share: float) -> Tensor:
    """The last law that was seen within a share of the time."""
    return next(law for time, law in reversed(seen) if time <= share * seen[-1][0])
