"""What a loss says of all pairs, from what it says of some thousand.

The derivatives by log pi of both responses are mostly two smooth functions of two numbers: of the
leads u = log pi(y) - log p_ref(y) and v = log pi(y') - log p_ref(y'), or of both log pi alone. N
responses have N^2 pairs, but on panels (:mod:`rl_ebm.studies.losses.panels`) these functions are
short sums of products: the loss is asked once at some places of each, and then all pairs at any law
are thin matrix products. Jumps that are known are taken off before, and added after. The pairs of a
panel where it is not smooth, at other kinks, are asked as ever. And at each law those of one
response are asked all the same: a loss that goes by more than these two numbers is seen by them,
and from then on asked of everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.drawn_pairs import Block, Drawn, More, Slopes
from rl_ebm.studies.losses.margins import Jumps, at_leads, goes_by_leads
from rl_ebm.studies.losses.panels import (
    ASIDE,
    CLOSE,
    PLACES,
    TERMS,
    Panel,
    panels_of,
    places_of,
    terms_of,
)

MANY = 2**20
"""pairs, above which it pays"""
WIDTHS = (4.0123, 2.0123, 1.0123)
"""of panels, nats: no round numbers, of which kinks are fond"""
MOST, PAYS = 1 / 3, 2.0
"""of those about the reference, so many are not smooth, at most; narrow ones pay for so many times
fewer"""
STRIDE = 7919
"""from the response that is asked at one law to that at the next one, beside so many"""
BESIDE = 256


@dataclass(frozen=True)
class Place:
    """Both leads of all responses at a law.

    Attributes:
        u: of those chosen.
        v: of those rejected.
        parts: of each panel of v, what is left of the sums when u is put in, (2, N, n), and
            Chebyshev's polynomials of those v that are in it, (m, n).
        order: which number of them, a panel after the other, each response has.
        panels: the number of panel of u and of v, of those that occur, and
        asked: whether the pairs of two such are to be asked; None if none is.
    """

    u: Float[Tensor, "N"]
    v: Float[Tensor, "N"]
    parts: list[tuple[Float[Tensor, "2 N n"], Float[Tensor, "_ n"]]]
    order: Int64[Tensor, "N"]
    panels: tuple[Int64[Tensor, "N"], Int64[Tensor, "N"]]
    asked: Bool[Tensor, "k l"] | None

    def table(self, which: int, chosen: slice, jumps: Jumps | None) -> Float[Tensor, "n N"]:
        """One of both derivatives, of some chosen responses with all others."""
        found = torch.cat([h[which, chosen] @ t.T for h, t in self.parts], -1)[:, self.order]
        if jumps is not None:
            margin = self.u[chosen, None] - self.v
            for at, jump in zip(jumps.places, jumps.jumps[which], strict=True):
                found += jump * (margin >= at)
        return found

    def unknown(self, block: Block) -> Bool[Tensor, "m"] | None:
        """Which of these pairs are to be asked; None if none is."""
        if self.asked is None:
            return None
        k, j = self.panels
        which = block.flat(self.asked[k[block.chosen]][:, j])
        return which if bool(which.any()) else None


@dataclass
class Surface:
    """Both derivatives of a loss of pairs, as functions of two leads.

    Attributes:
        drawn: pairs by which the loss is asked.
        lead: what log pi of each response leads: log p_ref, or 0.
        jumps: of a loss that goes by how far one lead is above the other.
        width: of panels, nats, and
        aside: of a width, how far below 0 one begins.
        size: of derivatives about the reference.
        mirrored: whether one derivative is the other turned round: how far apart both are counts.
    """

    drawn: Drawn
    lead: Float[Tensor, "N"]
    jumps: Jumps | None
    width: float
    aside: float
    size: float = field(default=0.0, init=False)
    mirrored: bool = field(default=True, init=False)
    _terms: dict[Panel, Tensor | None] = field(default_factory=dict, init=False, repr=False)
    _log_pi: Tensor | None = field(default=None, init=False, repr=False)
    _places: dict[More, Place | None] = field(default_factory=dict, init=False, repr=False)
    _laws: int = field(default=0, init=False)
    _wrong: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls, drawn: Drawn, log_ref: Float[Tensor, "N"], jumps: Jumps | None = None
    ) -> Surface | None:
        """None of a loss that goes by more than two leads, or is hardly smooth anywhere.

        Args:
            log_ref: log p_ref of each response.
            jumps: those that are known.
        """
        leads = (log_ref, torch.zeros_like(log_ref)) if jumps is None else (jumps.lead,)
        try:
            lead = next((x for x in leads if goes_by_leads(drawn, x)), None)
        except LossError:
            return None
        if lead is None:
            return None
        best, least = None, MOST * PAYS
        for width in WIDTHS:
            # Of log pi alone, which is at most 0, a panel ends there.
            found = cls(drawn, lead, jumps, width, ASIDE if bool(lead.any()) else 0.0)
            rough = found._rough(log_ref)
            if rough < least / PAYS:
                best, least = found, rough
        return best

    def _rough(self, log_ref: Float[Tensor, "N"]) -> float:
        """Which share of panels is not smooth, about the reference."""
        leads = log_ref - self.lead
        low, high = float(leads.min()) - WIDTHS[0], float(leads.max()) + WIDTHS[0]
        high = min(high, -float(self.lead.min()))  # of a response that is all there is
        ends = torch.tensor([low, high], dtype=torch.float64)
        first, last = (int(k) for k in panels_of(ends, self.width, self.aside)[0])
        panels = [(k, j) for k in range(first, last + 1) for j in range(first, last + 1)]
        if len(panels) * PLACES > len(leads) ** 2:
            return 1.0
        values = [self._values(panel) for panel in panels]
        self.size = max((float(x.abs().max()) for x in values if x is not None), default=0.0)
        for panel, found in zip(panels, values, strict=True):
            self._fit(panel, found)
        return sum(self._terms[panel] is None for panel in panels) / len(panels)

    @property
    def smooth(self) -> bool:
        """Whether no kink was seen, wherever it was."""
        if self._wrong or self.jumps is not None:
            return False
        return all(terms is not None for terms in self._terms.values())

    def at(self, asked: Drawn, log_pi: Tensor, block: Block, more: More) -> Slopes | None:
        """Both derivatives of these pairs; None where the loss itself is to be asked.

        Args:
            asked: whose pairs they are.
            more: what is added to log pi of both.

        Raises:
            LossError: the loss is NaN or infinite at one that it is asked of.
        """
        if self._wrong or any(isinstance(x, Tensor) for x in more):
            return None
        place = self._place(asked, log_pi, more)
        if place is None:
            return None
        x, y = self._pairs(place, block)
        which = place.unknown(block)
        if which is not None:
            found = asked.asked(log_pi, block.some(which), more)
            x, y = (a.masked_scatter(which, b) for a, b in zip((x, y), found, strict=True))
        return x, y

    def _pairs(self, place: Place, block: Block) -> Slopes:
        x = block.flat(place.table(0, block.chosen, self.jumps))
        return x, -x if self.mirrored else block.flat(place.table(1, block.chosen, self.jumps))

    def _place(self, asked: Drawn, log_pi: Tensor, more: More) -> Place | None:
        """Of this law, with so much added; None where it does not pay, or is not so."""
        if self._log_pi is None or not torch.equal(self._log_pi, log_pi):
            self._log_pi, self._places = log_pi.clone(), {}
        if more not in self._places:
            place = self._new_place(log_pi - self.lead, more)
            if place is not None and more == (0.0, 0.0):
                self._wrong = not self._is_so(asked, log_pi, place)
            self._places[more] = None if self._wrong else place
        return self._places[more]

    def _new_place(self, leads: Float[Tensor, "N"], more: More) -> Place | None:
        """None where leads are infinite, or more would be asked than there are pairs."""
        if not bool(torch.isfinite(leads).all()):
            return None
        u, v = (leads + x for x in more)
        (k, of_u), (j, of_v) = (panels_of(x, self.width, self.aside) for x in (u, v))
        (ks, number_k), (js, number_j) = (x.unique(return_inverse=True) for x in (k, j))
        panels = [(a, b) for a in ks.tolist() for b in js.tolist()]
        new = [panel for panel in panels if panel not in self._terms]
        if len(new) * PLACES > len(leads) ** 2:
            return None
        for panel in new:
            self._fit(panel, self._values(panel))
        parts = []
        for b in js.tolist():
            left = torch.zeros(2, len(u), TERMS, dtype=torch.float64)
            for a in ks.tolist():
                terms = self._terms[a, b]
                if terms is not None:
                    left[:, k == a] = of_u[k == a] @ terms
            parts.append((left, of_v[j == b]))
        order = torch.cat([(j == b).nonzero()[:, 0] for b in js]).argsort()
        asked = torch.tensor([self._terms[panel] is None for panel in panels])
        table = asked.view(len(ks), len(js)) if bool(asked.any()) else None
        return Place(u, v, parts, order, (number_k, number_j), table)

    def _is_so(self, asked: Drawn, log_pi: Tensor, place: Place) -> bool:
        """Whether the loss itself says so of one response that is chosen, each time of another."""
        self._laws += 1
        n = len(log_pi)
        i, every = self._laws * STRIDE % n, -(-n // BESIDE)
        p = asked.loss.chances(asked.log_mu, torch.tensor([i]))
        some = (torch.arange(n) + self._laws) % every == 0
        row = Block(slice(i, i + 1), p, (p > 0).flatten() & some)
        which = place.unknown(row)
        if which is not None:
            row = row.some(~which)
        if not len(row.flat(p)):
            return True
        found = torch.stack(asked.asked(log_pi, row))
        off = found - torch.stack(self._pairs(place, row))
        size = max(self.size, float(found.abs().max()))
        return float(off.abs().max()) <= CLOSE * size

    def _fit(self, panel: Panel, values: Float[Tensor, "2 m"] | None) -> None:
        """Its terms; None where a derivative is not smooth."""
        self._terms[panel] = terms = None if values is None else terms_of(values, self.size)
        if terms is not None:
            self.mirrored = self.mirrored and torch.equal(terms[0], -terms[1])

    def _values(self, panel: Panel) -> Float[Tensor, "2 m"] | None:
        """What the loss says at places of a panel, without its jumps; None where it fails."""
        u, v = places_of(panel, self.width, self.aside)
        try:
            found = at_leads(self.drawn, self.lead, u, v)
        except LossError:
            return None
        if self.jumps is not None:
            for at, jump in zip(self.jumps.places, self.jumps.jumps.T, strict=True):
                found = found - jump[:, None] * (u - v >= at)
        return found
