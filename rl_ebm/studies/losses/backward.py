"""Backward steps of a law along the gradient of a loss of pairs.

A loss of N responses has N^2 pairs: how its gradient changes takes three times what the gradient
does, and N^3 to solve for a step. Near a rest it hardly changes any more. So what was factored for
one step is kept for the next ones as long as each leaves a tenth of the gradient: a backward step
of the same length, by an older slope. Far from a rest steps are short, and few products do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl_ebm.studies.losses.drawn_pairs import Drawn, How, Slope, off_laws

LARGEST = 1.25
"""nats that log pi of a response moves in one of them, at most"""
FASTER = 8.0
"""by how much the next is longer; the first is one over the loss's curvature long"""
FAR, FAST = 0.6, 2.0
"""the same after one that moves an entry by more nats than this"""
SHORTER = 16.0
"""by how much a step is shortened that moves too far, at most; FAST at least"""
ROUGH = 1e-4
"""rate above which float32 is good for a step, in half the time: its error is 1e-7 over the rate"""
STRICT = 1e-6
"""of the largest curvature, the least that makes a minimum"""
LONGEST = 1e6
"""rate of a step that is hardly one"""
MANY = 512
"""responses from which factors cost more than some products, and"""
EASY, FEW, ENOUGH = 1e-4, 50, 1e-4
"""a rate above which a step takes few: so many twice at most, that leave no more of the gradient"""
PAYS = 0.1
"""of the gradient, what a step leaves that goes by an older slope"""


@dataclass(frozen=True)
class Solver:
    """A slope and a rate, factored."""

    lu: Float[Tensor, "N N"]
    pivots: Int[Tensor, "N"]
    rate: float

    @classmethod
    def of(cls, slope: Float[Tensor, "N N"], units: Tensor, rate: float) -> Solver | None:
        """None where it is singular."""
        matrix = slope.float() if rate > ROUGH else slope.clone()
        matrix.diagonal().add_(rate * units)
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        return None if int(info) else cls(lu, pivots, rate)

    def step(self, off: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Of log pi."""
        step: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, -off[:, None].to(self.lu))
        return step[:, 0].double()


def backward(
    slope: Float[Tensor, "N N"], off: Float[Tensor, "N"], units: Float[Tensor, "N"], rate: float
) -> tuple[Tensor, float, Solver | None] | None:
    """A step, shortened until no entry moves by more than :data:`LARGEST`; None where it fails.

    With it its rate, and what solved for it, where that will do for other steps.
    """
    while True:
        easy = rate > EASY and len(off) >= MANY
        solver, step = None, _at_once(slope, off, units, rate) if easy else None
        if step is None:
            solver = Solver.of(slope, units, rate)
            if solver is None:
                return None
            step = solver.step(off)
        if not bool(torch.isfinite(step).all()):
            return None
        longest = float(step.abs().max())
        if longest <= LARGEST or rate > LONGEST:
            return step.clamp(-LARGEST, LARGEST), rate, solver
        rate = max(rate * min(SHORTER, max(FAST, longest / LARGEST)), 1e-8)


def _at_once(
    slope: Float[Tensor, "N N"], off: Float[Tensor, "N"], units: Float[Tensor, "N"], rate: float
) -> Tensor | None:
    """A short step without factors, by stabilised biconjugate gradients (van der Vorst 1992).

    A few products with the slope, in float32: beside a large rate it is nearly diagonal. None where
    they leave too much.
    """
    matrix, units = slope.float(), units.float()
    own = 1 / (rate + matrix.diagonal() / units)

    def turned(z: Tensor) -> Tensor:
        z = own * z
        found: Tensor = (matrix @ z) / units + rate * z
        return found

    rest = -off.float() / units
    shadow, way, z = rest, rest, torch.zeros_like(rest)
    size, left, enough = rest @ shadow, float(rest.norm()), ENOUGH * float(rest.norm())
    for _ in range(FEW):
        if left <= enough or not math.isfinite(left):
            break
        moved = turned(way)
        along = size / (moved @ shadow)
        half = rest - along * moved
        turn = turned(half)
        share = (turn @ half) / (turn @ turn)
        z = z + along * way + share * half
        rest = half - share * turn
        before, size, left = size, rest @ shadow, float(rest.norm())
        way = rest + size / before * along / share * (way - share * moved)
    return (own * z).double() if left <= enough else None


def slope_at(drawn: Drawn, log_pi: Float[Tensor, "N"], small: float, centred: bool) -> Slope:
    """By differences of this step."""
    found, how = Slope.none(len(log_pi)), How(centred, drawn.apart)
    for block in drawn.blocks():
        at = partial(drawn.at, log_pi, block)
        here = at()
        found.add(block, here)
        found.add_second(block, small, at, here, how)
    return found


def is_minimum(drawn: Drawn, log_pi: Float[Tensor, "N"], small: float) -> bool:
    """Whether the expected loss is least at a rest, of all laws beside it, and curved every way.

    A gradient flow comes back to such a rest. The loss has no such curvature where its gradient is
    none of any function, as with parts held fixed; then no is the answer.
    """
    found = slope_at(drawn, log_pi, small, centred=True)
    largest = found.second.diagonal().abs().max()
    if bool((found.second - found.second.T).abs().max() > STRICT * largest):
        return False
    return curves_every_way(found.first, found.second, log_pi, drawn.log_mu.exp())


def curves_every_way(
    first: Float[Tensor, "N"],
    second: Float[Tensor, "N N"],
    log_pi: Float[Tensor, "N"],
    mu: Float[Tensor, "N"],
) -> bool:
    """Whether a loss with these derivatives by log pi, which are changed, curves upwards on laws.

    Args:
        mu: units are halfway between this law and the policy's.
    """
    pi = log_pi.exp()
    second.diagonal().sub_(pi * first.sum())  # laws stay laws: Lagrange's
    root = ((mu + pi) / 2).rsqrt()
    second.mul_(root).mul_(root[:, None])
    largest = second.diagonal().abs().max()
    normal = root * pi
    second.addr_(normal, normal, alpha=float(10 * largest / normal.square().sum()))
    second.diagonal().sub_(STRICT * largest)
    return not bool(torch.linalg.cholesky_ex(second).info)


@dataclass
class Backward:
    """Steps from one law to the next, of a loss whose pairs are drawn by a law that stays.

    Attributes:
        small: step of a difference, nats.
        centred: whether differences are taken to both sides.
        size: of the gradient at the law that was looked at last, in units of mu.
        rate: one over the length of the last step.
        known: the size where the slope was looked at.
    """

    drawn: Drawn
    small: float
    centred: bool
    size: float = field(default=math.inf, init=False)
    rate: float = field(default=0.0, init=False)
    known: float = field(default=math.inf, init=False)
    _solver: Solver | None = field(default=None, init=False)
    _paid: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._mu = self.drawn.log_mu.exp()

    def look(self, log_pi: Float[Tensor, "N"], keep: bool) -> None:
        """The gradient at a law; and its slope, where an older one does not pay.

        Args:
            keep: do without a new slope, whether that pays or not.

        Raises:
            LossError: a loss that is NaN or infinite there.
        """
        self._log_pi = log_pi
        if self._solver is not None and (keep or self._paid):
            self._see(self.drawn.first(log_pi))
            if keep or self._paid:
                return
        self._see(self._renew().first)
        self.known = self.size

    def _see(self, first: Float[Tensor, "N"]) -> None:
        before, self._off = self.size, off_laws(first, self._log_pi)
        self.size = float((self._off / self._mu).abs().max())
        self._paid = self.size <= PAYS * before

    def _renew(self) -> Slope:
        found = slope_at(self.drawn, self._log_pi, self.small, self.centred)
        self._slope, self._solver = found.on_laws(self._log_pi, self._mu), None
        if not self.rate:
            self._next = float((found.second.diagonal().abs() / self._units).max())
        return found

    @property
    def _units(self) -> Float[Tensor, "N"]:
        return (self._mu + self._log_pi.exp()) / 2

    def taken(self) -> Float[Tensor, "N"] | None:
        """log pi after a step from the law that was looked at last; None where there is none.

        Raises:
            LossError: as :meth:`look`.
        """
        if self._solver is not None:
            step = self._solver.step(self._off)
            if float(step.abs().max()) <= LARGEST:  # no NaN is
                self._next /= FASTER
                return torch.log_softmax(self._log_pi + step, 0)
            self._renew()
        found = backward(self._slope, self._off, self._units, self._next)
        if found is None:
            return None
        step, self.rate, self._solver = found
        self._next = self.rate / (FAST if float(step.abs().max()) > FAR else FASTER)
        return torch.log_softmax(self._log_pi + step, 0)

    def newton(self) -> Float[Tensor, "N"]:
        """The rest, one step further than these get: what they are shortened by is left out."""
        solver = Solver.of(self._slope, self._units, 0.0)
        if solver is None:
            return self._log_pi
        step = solver.step(self._off)
        small = float(step.abs().max()) <= LARGEST
        return torch.log_softmax(self._log_pi + step, 0) if small else self._log_pi
