r"""Where a preference loss comes to rest: an implicit flow in log pi of each response.

Any law over the responses is a policy. So the unknowns are x = log pi of each response, and they
follow their gradient in units of how often each is drawn: a pair whose order is plain hardly curves
the loss, and what goes by its gradient alone takes exp(largest gap of R) steps. Steps are Euler's,
backward (:mod:`rl_ebm.studies.losses.backward`): the last ones are Newton's.

A hinge's gradient jumps, and where its pairs end at their kinks it vanishes nowhere. There the loss
is averaged over a small shift s of each pair, (x + s, y - SKEW s) with s uniform in a window:

    g_window(x, y) = 1 / (2 width) \int_{-width}^{width} g(x + s, y - SKEW s) ds.

What the loss of a pair was a gradient of it still is, a kink becomes a slope of 1 / width, and its
place in the window is found by bisection, of all pairs at once. The rest is followed while the
window shrinks; it moves in proportion, so that two of them tell where it would be without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.studies.losses.backward import FASTER, Backward, backward
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.drawn_pairs import Block, Drawn, How, More, Slope, Slopes, off_laws

IMPLICIT = 400
"""implicit steps, at most"""
GONE = -60.0
"""nats that a response falls before it may be dead, which these steps do not see"""
SKEW = 0.6
"""of a shift, so that it crosses a kink in x, in y, and in x - y"""
WIDTHS = tuple(2.0**-k for k in range(15))
"""of the window, nats; the last is 6e-5, and"""
ROUGH_WIDTHS = WIDTHS[:11]
"""the last of a loss in float32 1e-3"""
WIDE = 0.1
"""a window in which something smooth may look bent"""
BENT = 0.2
"""second difference over first, in a window, of what has a kink there: else it is of the width"""
FLAT = 1e-9
"""of the largest derivative, what is none"""
HALVINGS = 20
"""of a window"""
ASIDE = 1 / 8
"""of a width, a step of a difference"""
STILL = 1e-2
"""of a width, a step after which a rest is found"""
TRIES = 30
"""steps in a window, at most"""
ENOUGH = 8
"""windows, after which one that fails is done without"""
PATIENCE = 30
"""implicit steps, of which a gradient that has a rest without kinks leaves no more than"""
FEWER = 0.9
"""of it, or move a response by as many as"""
ON_ITS_WAY = 3.0
"""nats; and"""
STILL_FOR = 3
"""of Newton's steps that halve nothing any more"""
WHOLE = 1e-6
"""rate of a step that is nearly Newton's, before which what is slow has hardly moved"""
NEWTON = 1e-12
"""rate of a step that is Newton's"""
PAST = 0.5
"""of the slope along a step, what is left of it or turned round at a point that will do, after"""
SHORTER = 6
"""shorter ones, at most"""


def rest_near(
    drawn: Drawn, log_pi: Float[Tensor, "N"], rest: float, small: float, centred: bool = False
) -> tuple[Float[Tensor, "N"], float] | None:
    """log pi where the expected gradient vanishes, and how far off in total variation.

    None where it does not. It is off by as much as Newton's steps move, when they get no shorter:
    a slow direction is further from its rest than its gradient is from 0.

    Args:
        rest: of its size in units of mu, a thousandth of what is none where Newton's steps no more
            halve it, nor themselves.
        small: step of a difference, nats.
        centred: whether differences are taken to both sides, for longer steps: of float32.
    """
    lowest, way = float(log_pi.min()) + GONE, Backward(drawn, small, centred)
    least, moved, still = (math.inf, math.inf), math.inf, 0
    seen: list[tuple[float, Tensor]] = []
    for _ in range(IMPLICIT):
        try:
            way.look(log_pi, keep=still > 0 and way.known <= 1e3 * rest)
            less = way.size < least[0] / 2 or moved < least[1] / 2
            still = 0 if less or way.rate > WHOLE else still + 1
            if way.size <= 1e3 * rest and still >= STILL_FOR:
                end = way.newton()
                return end, max(moved, float(tv(end, log_pi)))
            least = (min(way.size, least[0]), min(moved, least[1]))
            seen.append((least[0], log_pi))
            if len(seen) > PATIENCE:
                then, there = seen[-1 - PATIENCE]
                if least[0] > FEWER * then and float((log_pi - there).abs().max()) < ON_ITS_WAY:
                    return None
            new = way.taken()
        except LossError:
            return None
        if new is None or float(new.min()) < lowest:
            return None
        moved, log_pi = float(tv(log_pi, new)), new
    return None


def rest_on_kinks(
    drawn: Drawn, log_pi: Float[Tensor, "N"], rough: bool, widest: float = WIDTHS[0]
) -> tuple[Float[Tensor, "N"], float] | None:
    """log pi where the gradient jumps about 0, and how far off in total variation.

    None where no pair ends at a kink, or a response may die.

    Args:
        rough: whether the loss computes in float32.
        widest: of the windows, nats; less where the rest is known to be near.
    """
    lowest, laws, rate = float(log_pi.min()) + GONE, [log_pi], 0.0
    for width in (w for w in (ROUGH_WIDTHS if rough else WIDTHS) if w <= widest):
        try:
            begin = log_pi if len(laws) < 3 else _narrowed(laws[-2], laws[-1], 0.5)
            found = _in_window(drawn, begin, width, lowest, rate)
        except LossError:
            return None
        if found is None and len(laws) > ENOUGH:
            break
        if found is None:
            return None
        log_pi, rate = found
        laws.append(log_pi)
    coarse, fine = _narrowed(laws[-3], laws[-2]), _narrowed(laws[-2], laws[-1])
    return fine, float(tv(coarse, fine))


def _narrowed(
    wide: Float[Tensor, "N"], narrow: Float[Tensor, "N"], by: float = 1.0
) -> Float[Tensor, "N"]:
    """What a window without width gives: where kinks meet a rest moves by a share of its width.

    Args:
        by: of a window that is narrower by so much of its width.
    """
    return torch.log_softmax(narrow - by * (wide - narrow), 0)


def _in_window(
    drawn: Drawn, log_pi: Tensor, width: float, lowest: float, rate: float
) -> tuple[Tensor, float] | None:
    """The rest of what this window makes of the loss, and the rate of the last step.

    None where no kink is in it, or it fails. A step ends where the slope along it is small: that
    grows with each step of a loss that is convex, and beyond the rest it is positive.
    """
    mu = drawn.log_mu.exp()
    for _ in range(TRIES):
        now, kinks = _averaged(drawn, log_pi, width, curved=True)
        units, off = (mu + log_pi.exp()) / 2, off_laws(now.first, log_pi)
        rate = rate or max(float((x.abs() / units).max()) for x in (now.second.diagonal(), off))
        found = backward(now.on_laws(log_pi, mu), off, units, max(rate / FASTER, NEWTON))
        if found is None:
            return None
        step, rate, _ = found
        along, share = abs(float(off @ step)), 1.0
        for _ in range(SHORTER):
            new = torch.log_softmax(log_pi + share * step, 0)
            after = float(off_laws(_averaged(drawn, new, width)[0].first, new) @ step)
            if after <= PAST * along:
                break
            share *= max(0.1, along / (along + after))
        log_pi = new
        if float(new.min()) < lowest:
            return None
        if float(step.abs().max()) <= STILL * width and rate <= 1.0:
            return (log_pi, rate) if kinks or width > WIDE else None
    return None


def _averaged(
    drawn: Drawn, log_pi: Tensor, width: float, curved: bool = False
) -> tuple[Slope, int]:
    """Expected derivatives of a loss that is averaged over a window; how many pairs have kinks.

    Args:
        curved: with the second ones.
    """
    found, kinks = Slope.none(len(log_pi)), 0
    for block in drawn.blocks():
        here = _Window.of(drawn, log_pi, block, width, (0.0, 0.0))
        kinks += int(here.bent.sum())
        mean = here.mean(here)
        found.add(block, mean)
        if curved:
            found.add_second(block, ASIDE * width, here.beside, mean, How(apart=drawn.apart))
    return found, kinks


@dataclass(frozen=True)
class _Window:
    """Derivatives of pairs at both ends of their windows and in the middle."""

    drawn: Drawn
    log_pi: Tensor
    block: Block
    more: More
    width: float
    ends: tuple[Float[Tensor, "2 n"], Float[Tensor, "2 n"], Float[Tensor, "2 n"]]

    @classmethod
    def of(cls, drawn: Drawn, log_pi: Tensor, block: Block, width: float, more: More) -> _Window:
        ends = [
            torch.stack(drawn.at(log_pi, block, (more[0] + s, more[1] - SKEW * s)))
            for s in (-width, 0.0, width)
        ]
        return cls(drawn, log_pi, block, more, width, (ends[0], ends[1], ends[2]))

    @cached_property
    def bent(self) -> Bool[Tensor, "n"]:
        """Where there is a kink: the middle is not halfway."""
        low, middle, high = self.ends
        change = (high - low).abs().amax(0)
        second = (high - 2 * middle + low).abs().amax(0)
        none = FLAT * max(float(x.abs().max()) for x in self.ends)
        return (change > none) & (second > BENT * change)

    def beside(self, more: More) -> Slopes:
        """Of the window with this added to log pi of both."""
        return self.of(self.drawn, self.log_pi, self.block, self.width, more).mean(self)

    def mean(self, like: _Window) -> Slopes:
        """Simpson's, and of kinks by where they are.

        Args:
            like: the window that says where kinks are, and whose ends tell one side from the other.
        """
        low, middle, high = self.ends
        found, bent = (low + 4 * middle + high) / 6, like.bent
        if bool(bent.any()):
            share = self._share(like)
            found[:, bent] = low[:, bent] * share + high[:, bent] * (1 - share)
        return found[0], found[1]

    def _share(self, like: _Window) -> Float[Tensor, "n"]:
        """Of the window, what lies before the kink."""
        bent = like.bent
        block = self.block.some(bent)
        low, high = like.ends[0][:, bent], like.ends[2][:, bent]
        jump = high - low
        a, b = (torch.full((low.shape[1],), x).double() for x in (-self.width, self.width))
        for _ in range(HALVINGS):
            s = (a + b) / 2
            here = torch.stack(
                self.drawn.at(self.log_pi, block, (self.more[0] + s, self.more[1] - SKEW * s))
            )
            after = ((here - low) * jump).sum(0) > jump.square().sum(0) / 2
            a, b = torch.where(after, a, s), torch.where(after, s, b)
        return ((a + b) / 2 + self.width) / (2 * self.width)
