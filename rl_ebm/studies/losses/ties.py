"""Ties that hold: where a state's logits slide along as equals, without jumping about a kink.

A loss of a student's top k jumps where the k-th logit and the next are equal: each of the two is
pushed below the other as long as it is above, and so they go on side by side. Filippov (1988): such
a flow moves with the one mean of what it does on the kink's sides that stays on the kink. That is a
smooth flow, whose steps need not be short, and it is followed to the last digits, from one event to
the next: two logits meet, and pass or stay; one of those that are held together is left behind.

For states that do not see each other, :mod:`rl_ebm.studies.losses.visits`, with steps of their own;
one set of equals in each. What jumps elsewhere is left to steps of one length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.studies.losses.apart import LEAST
from rl_ebm.studies.losses.flow import Limit, step
from rl_ebm.studies.losses.responses import normalised
from rl_ebm.studies.losses.visits import Alone

ASIDE = 1e-12
"""nats above its equals, where a logit is looked at as the highest of them, and"""
CLEAR = 10.0
"""times as far other logits stand from there; and"""
MEET = 1e-8
"""nats between two that meet, and"""
START = 1e-7
"""between those that are equal at the start of a state that moves"""
ERRORS = (1e-5, 1e-6)
"""nats that a step may be off by, and"""
OF_STEP = 0.05
"""of the step itself"""
FAST = 1e-9
"""of a state's velocity, what is a motion"""
NEGATIVE = -1e-12
"""share of the time below which equals are no longer held together, and"""
PASSED = -1e-3
"""below which a step went too far"""
SOLVED = 1e-6
"""of a state's velocity, what the equals may differ by"""
ALIKE = 1e-7
"""of a state's velocity, what rounding makes of orders that move alike"""
NEAR = 1e-6
"""of a state's highest speed, where it is nearly at rest, and"""
REST = 1e-9
"""where it is at rest, or where that is less in units of the loss's own gradients:"""
STILL = 1e-12
LEFT = 1e-2
"""of the way from there to here, more than is left of it"""
SHORTEST = 1e-13
"""nats of a step that is explained by no kink between two logits"""
EVENTS = 100
"""at a state, at most: what meets again and again is held in a way that is not looked for"""
STEPS = 3000
"""at most; fewer where they cost more:"""
WORK = 100_000_000
"""rows that the loss is given in them"""


def followed_on_ties(alone: Alone, theta: Float[Tensor, "S A"]) -> Limit | None:
    """Where each state goes, by itself, along what ties hold; None where there is more to it.

    Twice: with two errors of a step, and with the other order of what is equal.

    Raises:
        LossError: the loss fails where a state stands; a step to where it fails is made shorter.
    """
    if alone.rough:  # a side is too near for it
        return None
    coarse = _Way(alone, theta, ERRORS[0], 1).end()
    fine = None if coarse is None else _Way(alone, theta, ERRORS[1], -1).end()
    if coarse is None or fine is None:
        return None
    return replace(fine, accuracy=fine.accuracy + float(tv(coarse.log_law, fine.log_law)))


@dataclass(frozen=True)
class _Pull:
    """How each state moves, and the least share of the time of an order of its equals."""

    velocity: Float[Tensor, "S A"]
    least: Float[Tensor, "S"]
    solved: Bool[Tensor, "S"]
    alike: Bool[Tensor, "S"]
    """whether all orders move it alike: there is no kink between its equals"""
    worst: Bool[Tensor, "S A"]
    """which of the equals is the first in the order that has the least share"""

    @property
    def holds(self) -> Bool[Tensor, "S"]:
        """Whether the equals are held together."""
        return self.solved & (self.least >= NEGATIVE)

    def where(self, which: Bool[Tensor, "S"], other: _Pull) -> _Pull:
        """This for these states, the other for the rest."""
        rows = which[:, None]
        return _Pull(
            torch.where(rows, self.velocity, other.velocity),
            torch.where(which, self.least, other.least),
            torch.where(which, self.solved, other.solved),
            torch.where(which, self.alike, other.alike),
            torch.where(rows, self.worst, other.worst),
        )


def pull(
    f: Callable[[Tensor], Tensor],
    theta: Float[Tensor, "S A"],
    tied: Bool[Tensor, "S A"],
    order: int,
) -> _Pull:
    """The mean of f, with the equals in each of some orders, that moves them all alike.

    There are as many orders as equals: each begins with another one, and goes round from there.

    Args:
        f: velocities of logits that are not equal.
        tied: the equals of each state; none, or two or more.
        order: 1 or -1: round as they stand, or every other one first.
    """
    count = int(tied.sum(1).max())
    states = len(tied)
    some = tied.any(1)
    if count == 0:
        always = torch.ones_like(some)
        return _Pull(f(theta), torch.zeros(states, dtype=theta.dtype), always, always, tied)
    places = tied.double().sort(dim=1, descending=True, stable=True).indices[:, :count]
    has, many = tied.gather(1, places), tied.sum(1, keepdim=True).clamp(min=1)
    ranks = torch.arange(count).expand(states, count)
    if order < 0:
        ranks = torch.where(ranks % 2 == 0, ranks // 2, (many + 1) // 2 + ranks // 2)
    ups = [ASIDE * (1 - (ranks - k) % many / many) * has for k in range(count)]
    aside = [torch.zeros_like(theta).scatter(1, places, up.double()) for up in ups]
    sides = torch.stack([f(theta + x) for x in aside])
    size = sides.abs().amax((0, 2)).clamp(min=1e-290)
    of_tied = sides.gather(2, places.expand(count, states, count)).permute(1, 2, 0)
    # Unknown are the shares of the orders, and the velocity that the equals have in common.
    system = torch.zeros(states, count + 1, count + 1, dtype=theta.dtype)
    system[:, :count, :count] = of_tied / size[:, None, None] * (has[:, :, None] & has[:, None])
    system[:, :count, :count] += torch.diag_embed((~has).double())
    system[:, :count, count] = -has.double()
    system[:, count, :count] = has.double()
    one = torch.zeros(states, count + 1, 1, dtype=theta.dtype)
    one[:, count] = some[:, None].double()
    found = _solved(system, one)
    off = (system @ found - one).abs().amax((1, 2))
    shares = found[:, :count, 0] * has
    mean = torch.einsum("sk,ksa->sa", shares, sides)
    mean = torch.where(tied, found[:, count] * size[:, None], mean)
    velocity = torch.where(some[:, None], mean, sides[0])
    alike = (sides - sides[0]).abs().amax((0, 2)) <= ALIKE * size
    least, k = shares.masked_fill(~has, torch.inf).min(1, keepdim=True)
    worst = torch.zeros_like(tied).scatter(1, places, (ranks == k) & has) & tied
    return _Pull(velocity, least[:, 0].masked_fill(~some, 0.0), off <= SOLVED, alike, worst)


def _solved(system: Float[Tensor, "S n n"], one: Float[Tensor, "S n 1"]) -> Float[Tensor, "S n 1"]:
    """The solution, of several the smallest; where none is, the nearest to one."""
    found: Tensor
    found, failed = torch.linalg.solve_ex(system, one)
    # Orders that move alike but for rounding have any shares: those that elimination finds are
    # as good as others where all are shares of a time, and nothing is known where they are not.
    shares = (found[:, :-1] - 0.5).abs().amax((1, 2)) <= 0.5
    again = (~shares | (failed != 0)).nonzero()[:, 0]
    if len(again):
        least = torch.linalg.lstsq(system[again], one[again], rcond=ALIKE, driver="gelsd")
        found[again] = least.solution
    return found


class _Way:
    """All states on their ways: their logits, which of them are equal, and how they move."""

    def __init__(self, alone: Alone, theta: Tensor, error: float, order: int) -> None:
        self.alone, self.error, self.order = alone, error, order
        self.allowed = ~torch.isneginf(alone.responses.start)
        ranks = torch.arange(theta.shape[1], dtype=theta.dtype)
        self.ranks = ranks if order > 0 else ranks.flip(0)
        speed = self._f(theta).abs().amax(1)
        moves = speed > REST * speed.max()
        self.theta = theta + START * self.ranks * (self.allowed & moves[:, None])
        self.tied = torch.zeros_like(self.allowed)
        self.events = torch.zeros(len(theta), dtype=torch.long)
        self.slid = False
        self.now = self._pull(self.theta)
        speed = self._speed()
        self.fastest = speed.maximum(LEAST * speed.max()).clamp(min=1e-290)
        self.length = 1e-2 / self.fastest
        self.near, self.was_near = self.theta, torch.zeros_like(speed, dtype=torch.bool)

    def _f(self, x: Tensor) -> Tensor:
        return (-self.alone.per_visit(x)).masked_fill(~self.allowed, 0.0)

    def _pull(self, theta: Tensor) -> _Pull:
        return pull(self._f, theta, self.tied, self.order)

    def _speed(self) -> Float[Tensor, "S"]:
        return self.now.velocity.abs().amax(1)

    def end(self) -> Limit | None:
        """The end, and what is left of the way; None where none is found."""
        r = self.alone.responses
        for _ in range(min(STEPS, WORK // self.alone.cost)):
            speed = self._speed()
            self.fastest = self.fastest.maximum(speed)
            is_near = speed <= NEAR * self.fastest
            self.near = torch.where((is_near & ~self.was_near)[:, None], self.theta, self.near)
            self.was_near = is_near
            going = speed > (REST * self.fastest).clamp(min=STILL)
            if not bool(going.any()):
                near, law = (r.log_law(normalised(x, r.start)) for x in (self.near, self.theta))
                dead, left = torch.zeros_like(self.tied), LEFT * float(tv(near, law))
                return Limit(self.theta, law, dead, left, kink=self.slid, many=True)
            if not self._turn(going):
                return None
        return None

    def _turn(self, going: Bool[Tensor, "S"]) -> bool:
        """An event, or a step, of every state that is not at rest; whether there was one."""
        self.tied = self.tied & ~(going & self.now.alike)[:, None]
        parted = self._parted(going)
        met = self._meeting(going & ~parted)
        events = parted | met.any((1, 2))
        self.events = self.events + events
        events = events | self._aside(going)
        if int(self.events.max()) > EVENTS or not self._passed_or_held(met):
            return False
        free = going & ~events
        if bool(free.any()) and not self._moved(free):
            return False
        if bool(events.any()):
            self.now = self._pull(self.theta).where(events, self.now)
        return True

    def _parted(self, going: Bool[Tensor, "S"]) -> Bool[Tensor, "S"]:
        """States whose equals are no longer held together: one is let go, or all where none can."""
        torn = going & ~self.now.holds
        if not bool(torn.any()):
            return torn
        self.theta, left = self._without(self.theta, self.tied, self.now)
        apart = MEET / (2 * len(self.ranks)) * self.ranks
        alone = left.sum(1, keepdim=True) < 2
        self.theta = self.theta - apart * (self.tied & alone & torn[:, None])
        self.tied = torch.where(torn[:, None], left & ~alone, self.tied)
        return torn

    def _without(
        self, theta: Tensor, tied: Bool[Tensor, "S A"], there: _Pull
    ) -> tuple[Tensor, Bool[Tensor, "S A"]]:
        """The one whose order would need a negative share of the time goes its own way.

        That is up where it rises beside the others, and else down. None is left where no shares
        hold them at all.
        """
        goes = there.solved & (there.least < NEGATIVE)
        which = there.worst & goes[:, None] & tied
        left = tied & ~which & (there.solved | ~tied.any(1))[:, None]
        own = self._f(torch.where(which, theta - 2 * MEET, theta))
        speed = pull(self._f, torch.where(which, theta - 2 * MEET, theta), left, self.order)
        others = speed.velocity.masked_fill(~left, -torch.inf).amax(1, keepdim=True)
        sign = torch.where(own > others, 1.0, -1.0)
        return torch.where(which, theta + 2 * MEET * sign, theta), left

    def _aside(self, going: Bool[Tensor, "S"]) -> Bool[Tensor, "S"]:
        """States where another logit stands among what is put aside of equals: it stands clear."""
        some = self.tied.any(1, keepdim=True)
        level = self.theta.masked_fill(~self.tied, -torch.inf).amax(1, keepdim=True)
        off = (self.theta - level).masked_fill(self.tied | ~self.allowed | ~some, torch.inf)
        among = (off.abs() < CLEAR * ASIDE) & going[:, None]
        clear = CLEAR * ASIDE * torch.where(off < 0, -1.0, 1.0)
        self.theta = torch.where(among, level + clear, self.theta)
        return among.any(1)

    def _gaps(self, theta: Tensor) -> Float[Tensor, "S A A"]:
        """How far the first of a pair stands above the second; inf for what is no pair."""
        gaps = theta[:, :, None] - theta[:, None]
        both, equal = (x[:, :, None] & x[:, None] for x in (self.allowed, self.tied))
        same = torch.eye(theta.shape[1], dtype=torch.bool)
        return gaps.masked_fill(~both | equal | same, torch.inf)

    def _closing(self) -> Float[Tensor, "S A A"]:
        v = self.now.velocity
        closing = v[:, None] - v[:, :, None]
        return closing.masked_fill(closing <= FAST * self._speed()[:, None, None], 0.0)

    def _meeting(self, going: Bool[Tensor, "S"]) -> Bool[Tensor, "S A A"]:
        """One pair of each state that meets now."""
        gaps = self._gaps(self.theta)
        now = (gaps >= 0) & (gaps <= MEET) & (self._closing() > 0) & going[:, None, None]
        first = now.flatten(1).double().argmax(1, keepdim=True)
        return torch.zeros_like(now).flatten(1).scatter(1, first, True).view_as(now) & now

    def _passed_or_held(self, met: Bool[Tensor, "S A A"]) -> bool:
        """Two that meet are held together, with those that each is held with; or the lower passes.

        False where others are held and there is a kink between the two as well.
        """
        if not bool(met.any()):
            return True
        upper, lower = (
            torch.where((x & self.tied).any(1)[:, None], self.tied, x)
            for x in (met.any(2), met.any(1))
        )
        both = upper | lower
        some = both.any(1)
        mean = (self.theta * both).sum(1, keepdim=True) / both.sum(1, keepdim=True).clamp(min=1)
        level = torch.where(both, mean, self.theta)
        beside = some & (self.tied & ~both).any(1)
        if bool(beside.any()):
            first, last = (self._pull(level + CLEAR * ASIDE * x).velocity for x in (upper, lower))
            kink = (first - last).abs().amax(1) > ALIKE * first.abs().amax(1)
            if bool((kink & beside).any()):
                return False
        there = pull(self._f, level, both, self.order)
        for _ in range(len(self.ranks) - 2):
            goes = there.solved & (there.least < NEGATIVE) & (both.sum(1) > 2)
            if not bool(goes.any()):
                break
            level, left = self._without(level, both & goes[:, None], there)
            both = torch.where(goes[:, None], left, both)
            there = pull(self._f, level, both, self.order)
        stays = (there.holds & ~there.alike & some & ~beside)[:, None]
        passing = self.theta + 3 * MEET * lower
        self.theta = torch.where(stays, level, torch.where(some[:, None], passing, self.theta))
        self.tied = torch.where(stays, both, self.tied)
        self.slid = self.slid or bool(stays.any())
        return True

    def _moved(self, free: Bool[Tensor, "S"]) -> bool:
        """A step of each of these states, or a shorter one next time; False where none is short."""
        last: list[_Pull] = [self.now]

        def f(x: Tensor) -> Tensor:
            last[:] = [self._pull(x)]
            return last[0].velocity

        gaps, closing = self._gaps(self.theta), self._closing()
        aim = torch.where(gaps > 1e-3, 0.9 * gaps, gaps - MEET / 2)
        until = (aim / closing).masked_fill((gaps < MEET) | (closing <= 0), torch.inf)
        h = self.length.minimum(until.amin((1, 2))) * free
        new, errors, _ = step(f, self.theta, self.now.velocity, h[:, None])
        error = errors.abs().amax(1)
        after = self._gaps(new)
        bad = ((gaps > 0) & (after < 0)).any((1, 2)) | ~last[0].solved
        bad |= last[0].least < PASSED
        allowed = (OF_STEP * h * self._speed()).clamp(max=self.error)
        right = free & ~bad & (error <= allowed)
        self.theta = torch.where(right[:, None], new, self.theta)
        self.now = last[0].where(right, self.now)
        fits = 0.9 * (allowed / error.clamp(min=1e-290)) ** (1 / 3)
        longer = torch.where(h < self.length, self.length, h * fits.clamp(0.2, 3.0))
        shorter = h * torch.where(bad, 0.5, fits.clamp(0.2, 0.5))
        self.length = torch.where(free, torch.where(right, longer, shorter), self.length)
        return not bool((free & ~right & (self.length * self._speed() < SHORTEST)).any())
