"""Losses of pairs that go by one number: by how much y leads y'.

Hinges do, beside a likelihood or not. The derivatives by log pi of both responses are two functions
of the margin m = (log pi - log pi') - (log p_ref - log p_ref'), or of the same without a reference.
Where they jump, by how much, and whether the rest of them is a straight line is found once, from
the loss itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.drawn_pairs import Block, Drawn
from rl_ebm.studies.losses.panels import is_smooth

REACH = 64.0
"""nats, the margins that are looked at for jumps"""
PLACES = 2**13
"""as many of them"""
WIDTH = 2.0123
"""of panels, nats, on which what is smooth has no jump; none ends at a round number"""
HALVINGS = 50
"""of what is between two"""
ROUNDS = 4
"""of looking, of which each finds one jump between two places"""
JUMP, ROUGH_JUMP = 1e-9, 1e-4
"""of the largest derivative, what is one; in float32"""
ALIKE, ROUGH_ALIKE = 1e-9, 1e-4
"""the same, how far two may be apart that are one function"""
FAR_DOWN = -REACH - 4.0
"""log pi of rejected responses there; those of chosen ones are not above 0 on any panel either"""
STRAY = 1e-3
"""pairs that rounding to float32 puts on the other side of a jump, at most"""
Line = tuple[Float[Tensor, "2"], float]


@dataclass(frozen=True)
class Jumps:
    """How both derivatives of such a loss go by the margin.

    Attributes:
        lead: the margin of each response is of log pi less this: log p_ref, or 0.
        places: margins at which they jump, and
        jumps: by how much.
        line: what is left without them: both at margin 0, and what that by log pi of a chosen
            response gains with each nat, and the other loses; None where it is no straight line,
            and the loss is to be asked.
    """

    lead: Float[Tensor, "N"]
    places: Float[Tensor, "K"]
    jumps: Float[Tensor, "2 K"]
    line: Line | None

    @classmethod
    def of(cls, drawn: Drawn, log_ref: Float[Tensor, "N"], rough: bool) -> Jumps | None:
        """None of a loss that goes by anything else, does not jump, or has no such gradient.

        It has one if what one derivative gains with the margin the other loses.

        Args:
            rough: whether it computes in float32.
        """
        block = drawn.few()
        for lead in (log_ref, torch.zeros_like(log_ref)):
            try:
                if goes_by(drawn, block, lead, rough):
                    return _found(drawn, lead, ROUGH_JUMP if rough else JUMP)
            except LossError:
                return None
        return None


def goes_by(drawn: Drawn, block: Block, lead: Float[Tensor, "N"], rough: bool) -> bool:
    """Whether pairs of one margin have the same derivatives: each pair is given the next one's."""
    n = len(drawn.log_mu)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_pi = torch.log_softmax(lead + noise, 0)
    x, y = block.both(log_pi - lead)
    more = (x - y).roll(1) - (x - y)
    here = torch.stack(drawn.asked(log_pi, block)).roll(1, 1)
    close = (ROUGH_ALIKE if rough else ALIKE) * float(here.abs().max())
    down = float(more.abs().max()) + torch.zeros_like(more)  # log pi stays below 0
    for a, b in ((more - down, -down), (0.3 * more - down, -0.7 * more - down)):
        off = (torch.stack(drawn.asked(log_pi, block, (a, b))) - here).abs().amax(0) > close
        if float(off.double().mean()) > (STRAY if rough else 0.0):
            return False
    return True


def goes_by_leads(drawn: Drawn, lead: Float[Tensor, "N"]) -> bool:
    """Whether pairs of the same two leads have the same derivatives: each has the next one's.

    Raises:
        LossError: the loss is NaN or infinite there.
    """
    block = drawn.few()
    noise = torch.randn(len(lead), generator=torch.Generator().manual_seed(0)).double()
    low = noise - noise.max() - 1.0  # log pi stays below 0 wherever these are
    u, v = block.both(low)
    here = torch.stack(drawn.asked(low + lead, block)).roll(1, 1)
    off = torch.stack(drawn.asked(low + lead, block, (u.roll(1) - u, v.roll(1) - v))) - here
    return float(off.abs().max()) <= ALIKE * float(here.abs().max())


@dataclass(frozen=True)
class _Alike(Block):
    """A response beside itself, so many times: pairs whose leads are what is added."""

    count: int

    def both(self, values: Shaped[Tensor, "N"]) -> tuple[Tensor, Tensor]:
        each = values[self.chosen].expand(self.count)
        return each, each


def at_leads(
    drawn: Drawn, lead: Float[Tensor, "N"], u: Float[Tensor, "m"], v: Float[Tensor, "m"]
) -> Float[Tensor, "2 m"]:
    """Both derivatives at leads of one's own choice, by the response whose log pi is lowest then.

    Raises:
        LossError: the loss is NaN or infinite there.
    """
    i = int(lead.argmin())
    pairs = _Alike(slice(i, i + 1), torch.ones(1, 1).double(), None, len(u))
    return torch.stack(drawn.asked(torch.full_like(lead, float(lead[i])), pairs, (u, v)))


def _at(drawn: Drawn, margins: Float[Tensor, "m"]) -> Float[Tensor, "2 m"]:
    """Both derivatives at margins of one's own choice."""
    low = torch.full_like(margins, FAR_DOWN)
    return at_leads(drawn, torch.zeros_like(drawn.log_mu), low + margins, low)


def _found(drawn: Drawn, lead: Tensor, least: float) -> Jumps | None:
    """Between ever nearer places: what does not shrink is a jump."""
    # Not at round numbers, of which kinks are fond.
    grid = torch.linspace(-REACH - 1e-3 * math.pi, REACH, PLACES, dtype=torch.float64)
    values = _at(drawn, grid)
    if is_smooth(partial(_at, drawn), grid, values, WIDTH):
        return None
    least *= float(values.abs().max())
    total = values.sum(0)
    if float(total.max() - total.min()) > least:
        return None
    places: list[float] = []
    jumps: list[Tensor] = []
    for _ in range(ROUNDS):
        where, jump = _halved(drawn, grid, values, (places, jumps), least)
        new = (jump.abs().amax(0) > least).nonzero()[:, 0].tolist()
        if not new:
            break
        for i in new:
            places.append(float(where[i]))
            jumps.append(jump[:, i])
            values = values - jump[:, i, None] * (grid >= where[i])
    if not places:
        return None
    slope = (values[:, -1] - values[:, 0]) / (grid[-1] - grid[0])
    at_0 = values[:, 0] - slope * grid[0]
    off = float((values - at_0[:, None] - slope[:, None] * grid).abs().max())
    gains = float(slope[0]) if abs(float(slope[0])) * REACH > least else 0.0
    line = (at_0, gains) if off <= least else None
    return Jumps(lead, torch.tensor(places, dtype=torch.float64), torch.stack(jumps, 1), line)


def _halved(
    drawn: Drawn,
    grid: Tensor,
    values: Tensor,
    known: tuple[list[float], list[Tensor]],
    least: float,
) -> tuple[Float[Tensor, "m"], Float[Tensor, "2 m"]]:
    """Where between two places most is left of their difference, and how much; known ones aside.

    Args:
        known: jumps, where and by how much.
        least: what is none: where nothing more is left anywhere, that is all.
    """
    low, high = grid[:-1], grid[1:]
    below, above = values[:, :-1], values[:, 1:]
    for _ in range(HALVINGS):
        if float((above - below).abs().max()) <= least:
            break
        middle = (low + high) / 2
        here = _at(drawn, middle)
        for place, jump in zip(*known, strict=True):
            here = here - jump[:, None] * (middle >= place)
        first = (here - below).abs().sum(0) >= (above - here).abs().sum(0)
        high, above = torch.where(first, middle, high), torch.where(first, here, above)
        low, below = torch.where(first, low, middle), torch.where(first, below, here)
    return high, above - below
