"""Where kinks meet, of a loss of pairs that goes by margins: a rest by ever narrower windows.

What :mod:`rl_ebm.studies.losses.pair_rests` does pair by pair, bisecting each window, takes no call
of the loss here, or three. The mean of a jump over a logistic window of width w is

    jump * sigmoid((m - place) / w),

which curves everywhere, so that Newton's steps find the rest in it; of what is left without the
jumps it is the mean over three places. Where w shrinks, (m - place) / w stays what it is, of all
pairs that end at a jump: from each rest one sees the next one, and the last, of no window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.studies.losses.backward import curves_every_way
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.drawn_pairs import Block, Drawn, off_laws
from rl_ebm.studies.losses.margins import Jumps

WINDOWS = tuple(2.0**-k for k in range(21))
"""widths, nats, each half of the one before; the last is 1e-6, of a loss in float32 1e-3"""
ROUGH_WINDOWS = WINDOWS[:11]
THREE = math.pi
"""widths to both sides of three places with the logistic density's variance, pi^2 / 3"""
SEEN = 20.0
"""widths from a jump, where a pair has none of it"""
SURE = 1e-9
"""total variation between what two windows see that is none"""
VAGUE = 1e-2
"""the same, what says nothing"""
STILL = 1e-4
"""of a window, a step after which a rest in it is found: the next would be as much of this one"""
TRIES = 40
"""steps in a window, at most"""
LARGEST = 1.25
"""nats that log pi of a response moves in one of them, at most, and"""
TOO_FAR = 4.0
"""times that, where a step is given up for a shorter one"""
FASTER, SHORTEST = 8.0, 16.0
"""by how much the next is longer; and shorter than one that goes too far, at most"""
LEAST, WHOLE, LONGEST = 1e-12, 1e-6, 1e6
"""rates: of a step that is Newton's, nearly so, and hardly one"""
PAST = 0.5
"""of the slope along a step, what is left of it or turned round at a point that will do, after"""
SHORTER = 6
"""shorter ones, at most"""
MOST = 500
"""conjugate gradients of a step, that leave"""
ROUGHLY, LEFT = 0.1, 1e-9
"""of a gradient, at most and at least"""
ROUNDED = 1e-13
"""of one that no law feels, what rounding leaves"""
TILE = 256
"""rows and columns of a table that a cache holds"""
FLAT = 1e-12
"""in units of how each curves alone, what curves not at all"""


@dataclass(frozen=True)
class Averaged:
    """Expected derivatives by log pi of a loss that is averaged over a window, and theirs."""

    first: Float[Tensor, "N"]
    second: Float[Tensor, "N N"]


@dataclass(frozen=True)
class Margins:
    """Pairs of a law that stays, and how their loss jumps."""

    drawn: Drawn
    found: Jumps

    def averaged(self, log_pi: Float[Tensor, "N"], width: float) -> Averaged:
        """Of a window of this width."""
        n, lead = len(log_pi), log_pi - self.found.lead
        first, second = (torch.zeros(shape, dtype=torch.float64) for shape in ((n,), (n, n)))
        for block in self.drawn.blocks():
            chosen = block.chosen
            margin = lead[chosen, None] - lead
            bent = self._between(first, log_pi, block, margin, width)
            for place, jump in zip(self.found.places, self.found.jumps.T, strict=True):
                share = ((margin - place) / width).sigmoid_()
                beyond = block.p * share
                first[chosen] += jump[0] * beyond.sum(1)
                first += jump[1] * beyond.sum(0)
                bent += beyond.mul_(share.neg_().add_(1)).mul_(jump[0] / width)
            second[chosen] = bent
        _mirror(second)
        second.neg_()
        second.diagonal().sub_(second.sum(1))
        return Averaged(first, second)

    def _between(
        self, first: Tensor, log_pi: Tensor, block: Block, margin: Tensor, width: float
    ) -> Tensor:
        """The mean of what the loss is without its jumps is added to its derivatives.

        Returned are their own, weighted, by log pi of chosen responses.
        """
        chosen, p = block.chosen, block.p
        if self.found.line is not None:
            (at_x, at_y), slope = self.found.line
            each = slope * (p * margin) if slope else torch.zeros_like(p)
            first[chosen] += at_x * p.sum(1) + each.sum(1)
            first += at_y * p.sum(0) - each.sum(0)
            return slope * p
        h = THREE * width
        low, middle, high = (
            torch.stack([block.table(g) for g in self.drawn.at(log_pi, block, (s, 0.0))])
            for s in (-h, 0.0, h)
        )
        for place, jump in zip(self.found.places, self.found.jumps.T, strict=True):
            low -= jump[:, None, None] * (margin - h >= place)
            middle -= jump[:, None, None] * (margin >= place)
            high -= jump[:, None, None] * (margin + h >= place)
        gx, gy = p * (low + 4 * middle + high) / 6
        first[chosen] += gx.sum(1)
        first += gy.sum(0)
        bends: Tensor = p * (high - low)[0] / (2 * h)
        return bends

    def rest(
        self, log_pi: Float[Tensor, "N"], lowest: float, rough: bool, widest: float = math.inf
    ) -> tuple[Tensor, float] | None:
        """log pi where derivatives jump about 0, and how far off in total variation.

        None where no pair ends at a jump, or a response may die.

        Args:
            lowest: nats below which a response may be dead.
            rough: whether the loss computes in float32.
            widest: of the windows, nats.
        """
        ends: list[Tensor] = []
        begins, rate, off = [log_pi], 0.0, math.inf
        for width in (w for w in (ROUGH_WINDOWS if rough else WINDOWS) if w <= widest):
            try:
                found = self._in_window(begins, width, lowest, rate)
            except LossError:
                return None
            if found is None:
                break
            log_pi, now, rate = found
            if not self._inside(log_pi, width):
                return None
            step = self._narrowing(now, log_pi, width)
            begins = [log_pi]
            if step is not None:
                begins.append(torch.log_softmax(log_pi + step / 2, 0))
                ends.append(torch.log_softmax(log_pi + step, 0))
            off = _apart(ends)
            if off <= SURE:
                break
        return (_seen(ends), off) if off <= VAGUE else None

    def _narrowing(self, now: Averaged, log_pi: Tensor, width: float) -> Tensor | None:
        """How far a rest moves while its window shrinks to nothing, by how it begins to.

        There (m - place) / width stays what it is, of each pair that ends at a jump.
        """
        pulled, lead = torch.zeros_like(log_pi), log_pi - self.found.lead
        for block in self.drawn.blocks():
            margin = lead[block.chosen, None] - lead
            for place, jump in zip(self.found.places, self.found.jumps[0], strict=True):
                past = (margin - place) / width
                share = torch.sigmoid(past)
                pull = past.mul_(share).mul_(1 - share).mul_(block.p).mul_(jump)
                pulled[block.chosen] -= pull.sum(1)
                pulled += pull.sum(0)
        units = (self.drawn.log_mu.exp() + log_pi.exp()) / 2
        return _solved(now, log_pi, pulled, LEAST * units, LEFT)

    def _inside(self, log_pi: Tensor, width: float) -> bool:
        """Whether a pair has a jump in its window."""
        lead = log_pi - self.found.lead
        for block in self.drawn.blocks():
            margin = lead[block.chosen, None] - lead
            for place in self.found.places:
                if bool((((margin - place).abs() < SEEN * width) & (block.p > 0)).any()):
                    return True
        return False

    def is_minimum(self, log_pi: Float[Tensor, "N"]) -> bool:
        """Whether the loss is least at a rest, of all laws beside it, and no law beside it is.

        It is where the mean over a small window comes to its own rest beside it, and curves every
        way there. At the edge of what is flat it comes to none.
        """
        width = ROUGH_WINDOWS[-1]
        try:
            beside = self._in_window([log_pi], width, -math.inf, LEAST)
        except LossError:
            return False
        if beside is None:
            return False
        near, now, _ = beside
        if float((near - log_pi).abs().max()) > SEEN * width:
            return False
        return curves_every_way(now.first, now.second, near, self.drawn.log_mu.exp())

    def _in_window(
        self, begins: Sequence[Tensor], width: float, lowest: float, rate: float
    ) -> tuple[Tensor, Averaged, float] | None:
        """The rest of the mean over this window, what is there, and the rate of the last step.

        None where it fails. It begins where the gradient is smaller. A step ends where the slope
        along it is small: that grows with each step of a loss that is convex.
        """
        seen = [(self.averaged(log_pi, width), log_pi) for log_pi in begins]
        now, log_pi = min(seen, key=lambda x: float(off_laws(x[0].first, x[1]).norm()))
        mu, moved = self.drawn.log_mu.exp(), math.inf
        for _ in range(TRIES):
            units, off, before = (mu + log_pi.exp()) / 2, off_laws(now.first, log_pi), moved
            rate = rate or max(float((x.abs() / units).max()) for x in (now.second.diagonal(), off))
            left = max(LEFT, ROUGHLY * min(1.0, moved / width) ** 2)
            taken = _step(now, log_pi, units, max(rate / FASTER, LEAST), left)
            if taken is None:
                return None
            step, rate = taken
            along, share = abs(float(off @ step)), 1.0
            for _ in range(SHORTER):
                new = torch.log_softmax(log_pi + share * step, 0)
                now = self.averaged(new, width)
                after = float(off_laws(now.first, new) @ step)
                if after <= PAST * along:
                    break
                share *= max(0.1, along / (along + after))
            log_pi, moved = new, float(step.abs().max())
            if float(new.min()) < lowest:
                return None
            short = moved <= STILL * width or before / 2 <= moved <= 1e-3 * width
            if short and rate <= WHOLE:
                return log_pi, now, rate
        return None


def _mirror(table: Float[Tensor, "N N"]) -> None:
    """Its transpose is added to it, a tile at a time: as a whole that reads memory across."""
    for i in range(0, len(table), TILE):
        for j in range(i, len(table), TILE):
            a, b = table[i : i + TILE, j : j + TILE], table[j : j + TILE, i : i + TILE]
            both = a + b.T
            a.copy_(both)
            b.copy_(both.T)


def _seen(ends: Sequence[Float[Tensor, "N"]]) -> Float[Tensor, "N"]:
    """What two windows see of the end: each errs by its width squared, of what bends on the way."""
    return torch.log_softmax(ends[-1] + (ends[-1] - ends[-2]) / 3, 0)


def _apart(ends: Sequence[Float[Tensor, "N"]]) -> float:
    """Total variation between that and what was seen before."""
    return float(tv(_seen(ends[:-1]), _seen(ends))) if len(ends) > 2 else math.inf


def _step(
    now: Averaged, log_pi: Float[Tensor, "N"], units: Float[Tensor, "N"], rate: float, left: float
) -> tuple[Tensor, float] | None:
    """A backward step, shortened until no entry moves by more than :data:`LARGEST`; its rate.

    None where no step is short enough.

    Args:
        left: of the gradient, what the step may leave.
    """
    while rate < LONGEST:
        step = _solved(now, log_pi, -now.first, rate * units, left, TOO_FAR * LARGEST)
        longest = math.inf if step is None else float(step.abs().max())
        if step is not None and longest <= LARGEST:
            return step, rate
        rate = max(rate * min(SHORTEST, max(2.0, longest / LARGEST)), 1e-8)
    return None


def _solved(
    now: Averaged,
    log_pi: Float[Tensor, "N"],
    force: Float[Tensor, "N"],
    more: Float[Tensor, "N"],
    left: float,
    far: float = math.inf,
) -> Tensor | None:
    """What moves laws by conjugate gradients; None where they meet no curvature, or go too far.

    Laws stay laws: what moves their sum is taken out.

    Args:
        force: curvature times what is looked for.
        more: curvature of each response beside the loss's own.
        left: of the force, what may be left.
        far: nats that no entry is to move.
    """
    pi = log_pi.exp()
    more = more - pi * now.first.sum()  # Lagrange's
    scale = (now.second.diagonal() + more).clamp(min=1e-300).rsqrt()
    normal = scale * pi / (scale * pi).norm()

    def on_laws(z: Tensor) -> Tensor:
        moved: Tensor = z - normal * (normal @ z)
        return moved

    z = torch.zeros_like(pi)
    way = rest = on_laws(scale * force)
    size = float(rest @ rest)
    enough = max(left * size**0.5, ROUNDED * float((scale * force).norm())) ** 2
    if size <= enough:
        return z
    for _ in range(MOST):
        v = scale * way
        moved = on_laws(scale * (now.second @ v + more * v))
        bends = float(way @ moved)
        if not bends > FLAT * float(way @ way):
            return None
        z, rest = z + size / bends * way, rest - size / bends * moved
        before, size = size, float(rest @ rest)
        if size <= enough:
            break
        if float((scale * z).abs().max()) > far:
            return None
        way = rest + size / before * way
    found: Tensor = scale * z
    return found
