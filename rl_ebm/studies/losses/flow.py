"""An expected gradient as a flow: in which direction it goes, one step of it, and a limit.

The flow is d theta / dt = -F(theta). What is rarely visited moves as rarely in it, so that a rest
is looked for along the direction D = -F / (mass of each state and action): it is at rest where F
is, and turns no logit's sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.soft_bellman import log_policy
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.responses import Responses, normalised

FAR = 2.0
"""most that a logit moves in a step"""
GONE = -40.0
"""log pi below which an action that is pushed down is dead, and a state is not visited"""


@runtime_checkable
class Field(Protocol):
    """An expected gradient, and how often each action is drawn."""

    @property
    def responses(self) -> Responses: ...

    @property
    def cost(self) -> int:
        """Rows that the loss is given for one field."""

    def rest_near(self, theta: Tensor, rest: float) -> tuple[Tensor, float] | None:
        """Logits at rest, and how far off in total variation, by a method of the kind's own.

        None where it has none, or it fails.
        """

    @property
    def kinks_first(self) -> bool:
        """Whether rests where kinks meet are looked for before smooth ones."""

    def is_minimum(self, theta: Tensor, kink: bool = False) -> bool:
        """Whether a rest is known to be one to which the flow comes back; False: to be tried.

        Args:
            kink: whether it is where kinks meet.
        """

    def rest_on_kinks(self, theta: Tensor, within: float = math.inf) -> tuple[Tensor, float] | None:
        """The same where kinks meet, within so many nats."""

    def field(self, theta: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Limit:
    """Where a flow ends.

    Attributes:
        theta: the logits there, -inf of what is dead.
        log_law: of every response that the reference allows.
        dead: actions that states which are visited have lost.
        accuracy: in total variation; inf where it did not settle.
        kink: whether it slides along one.
        faint: whether what is dead may be alive, and too rare for float64.
        many: whether there are rests beside it, and the way decided.
        ahead: whether it is no end: a place on the way, from which the flow is to be followed.
    """

    theta: Float[Tensor, "S A"]
    log_law: Float[Tensor, "N"]
    dead: Bool[Tensor, "S A"]
    accuracy: float
    kink: bool = False
    faint: bool = False
    many: bool = False
    ahead: bool = False

    @property
    def settled(self) -> bool:
        return math.isfinite(self.accuracy)


@dataclass(frozen=True)
class Direction:
    """D, and what counts of it, at one point."""

    value: Float[Tensor, "S A"]
    alive: Bool[Tensor, "S A"]
    """actions that a rest needs at rest: of states that are visited, and not dead"""
    lost: Bool[Tensor, "S A"]
    """dead actions of states that are visited"""

    @property
    def size(self) -> float:
        return self.size_of(self.alive)

    def size_of(self, which: Bool[Tensor, "S A"]) -> float:
        """Largest entry of these."""
        rest = self.value.abs()[which]
        return float(rest.max()) if len(rest) else 0.0

    def left(self, r: Responses) -> Direction:
        """Without the states to which only dead actions lead."""
        lost = r.at_tokens(self.lost.double()).cumsum(1).roll(1, 1) > 0
        lost[:, 0] = False
        reached = torch.zeros(len(self.lost), dtype=torch.bool)
        reached[r.states[r.mask & ~lost]] = True
        return Direction(self.value, self.alive & reached[:, None], self.lost)


def direction(flow: Field, theta: Tensor) -> Direction:
    """D at a point: the mass is the mean of what is drawn and what the policy would draw there."""
    r = flow.responses
    allowed = ~torch.isneginf(r.start)
    gradient, mass = flow.field(theta)
    log_pi = normalised(theta, r.start)
    units = (mass + mass.sum(1, keepdim=True) * log_pi.exp()) / 2
    value = (-gradient / units.clamp(min=1e-290)).masked_fill(~allowed | (units <= 1e-290), 0.0)
    visited = mass.sum(1, keepdim=True).log() > GONE
    mean = (log_pi.exp() * value).sum(1, keepdim=True)
    lost = allowed & visited & (log_pi < GONE) & (value < mean)
    alive = allowed & visited & ~lost
    # A common number at each state moves no law. Only a loss that reads logits has a say in it.
    law = log_pi.masked_fill(~alive, -torch.inf)
    level = (log_policy(law).exp() * value).sum(1, keepdim=True)
    free = gradient.sum(1, keepdim=True).abs() <= 1e-9 * gradient.abs().sum(1, keepdim=True)
    value = torch.where(free & allowed, value - level, value)
    return Direction(value, alive, lost)


def step(
    f: Callable[[Tensor], Tensor], theta: Tensor, first: Tensor, h: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of order 3, no logit by more than :data:`FAR`; its error, and f at its end.

    It has a length, or one for each state, (S, 1).

    A trial that leaves float64, or what the loss can take, has an infinite error.
    """

    def moved(slope: Tensor) -> Tensor:
        return theta + slope.clamp(-FAR, FAR)

    try:
        second = f(moved(h / 2 * first))
        third = f(moved(h * 3 / 4 * second))
        new = moved(h / 9 * (2 * first + 3 * second + 4 * third))
        last = f(new)
    except LossError:
        return theta, torch.full_like(theta, torch.inf), first
    return new, h / 72 * (-5 * first + 6 * second + 8 * third - 9 * last), last


def to_go(law_by: Callable[[float], Tensor], still: float = 0.0) -> float:
    """How far a law still is from its end, in total variation: 1 where that cannot be told yet.

    It is as far as it came in the last half of the time: it comes less far in the next, as long,
    where that was less than half of what it came in the quarter before.

    Args:
        law_by: the log-law that was seen last within a share of the time.
        still: what is less is no motion.
    """
    quarter, half, now = (law_by(share) for share in (0.25, 0.5, 1.0))
    before, last = float(tv(quarter, half)), float(tv(half, now))
    return 2 * last if last < before / 2 or max(before, last) < still else 1.0


def finished(flow: Field, theta: Tensor, now: Direction, size: float, unit: float = 1.0) -> Limit:
    """At rest; its accuracy in nats, where D was of the size of a unit at the start."""
    r = flow.responses
    size /= unit if unit > 0 else 1.0
    theta = theta.masked_fill(torch.isneginf(r.start) | now.lost, -torch.inf)
    return Limit(theta, r.log_law(normalised(theta, r.start)), now.lost, size)


@dataclass
class Marks:
    """Laws on the way to a rest, each where D was a tenth of what it was at the one before.

    What comes to rest slowly is further from there than D is from 0: as far as it came, by how much
    of D is left.
    """

    responses: Responses
    seen: list[tuple[float, Tensor]] = field(default_factory=list)

    def see(self, size: float, theta: Float[Tensor, "S A"]) -> None:
        """The law of some logits, with a D of this size."""
        if not self.seen or size <= self.seen[-1][0] / 10:
            r = self.responses
            self.seen.append((size, r.log_law(normalised(theta, r.start))))

    def known(self, end: Limit, size: float) -> Limit:
        """The rest, known no better than that."""
        before = [mark for mark in self.seen if mark[0] >= 3 * size > 0]
        if not before:
            return end
        larger, log_law = before[-1]
        left = float(tv(log_law, end.log_law)) * size / (larger - size)
        return replace(end, accuracy=max(end.accuracy, left))
