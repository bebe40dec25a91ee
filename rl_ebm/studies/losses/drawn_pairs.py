"""All pairs of responses that are ever drawn: the expected loss of them, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from rl_ebm.studies.losses.contract import LossError

PAIRS = 2**17
"""pairs that a loss is given at a time, and"""
KEPT = 2**25
"""those whose probabilities are kept, at most: 8 bytes each"""
FEW = 2**13
"""that it is tried on, to see what it goes by: some take a second for ten times as many"""
TRIED = (0.5, 3.0)
"""nats by which responses differ in laws that a loss is tried at"""


@dataclass(frozen=True)
class Block:
    """Pairs of some chosen responses with all others, without those that are never drawn.

    Attributes:
        chosen: n of them, one after another.
        p: probability of each pair.
        drawn: where it is not 0, flat; None for all.
    """

    chosen: slice
    p: Float[Tensor, "n N"]
    drawn: Bool[Tensor, "nN"] | None

    def both(self, values: Shaped[Tensor, "N"]) -> tuple[Tensor, Tensor]:
        """Those of the chosen response and of the rejected one, of each pair."""
        return self.flat(values[self.chosen, None]), self.flat(values[None])

    def flat(self, table: Shaped[Tensor, "n_or_1 N_or_1"]) -> Shaped[Tensor, "m"]:
        """The entries of the pairs."""
        found = table.expand(self.p.shape).reshape(-1)
        return found if self.drawn is None else found[self.drawn]

    def weighted(self, values: Float[Tensor, "m"]) -> Float[Tensor, "n N"]:
        """Times the probabilities, as a table."""
        return self.p * self.table(values)

    def table(self, values: Float[Tensor, "m"]) -> Float[Tensor, "n N"]:
        """With zeros for pairs that are never drawn."""
        if self.drawn is None:
            return values.view_as(self.p)
        found = torch.zeros(self.drawn.shape, dtype=values.dtype)
        found[self.drawn] = values
        return found.view_as(self.p)

    def some(self, which: Bool[Tensor, "m"]) -> Block:
        """Those pairs alone."""
        if self.drawn is None:
            return replace(self, drawn=which)
        left = self.drawn.clone()
        left[self.drawn] = which
        return replace(self, drawn=left)


@runtime_checkable
class PairSlopes(Protocol):
    """A loss of pairs, drawn by a law that stays."""

    def slopes(
        self, x: Float[Tensor, "m"], y: Float[Tensor, "m"], block: Block, mean_count: float
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
        """The loss's derivatives by log pi of chosen responses and of rejected ones."""

    def chances(
        self, log_mu: Float[Tensor, "N"], chosen: Int64[Tensor, "n"]
    ) -> Float[Tensor, "n N"]:
        """Probability that a pair is (chosen, rejected)."""

    def mean_count(self, log_mu: Float[Tensor, "N"]) -> float:
        """Of a pair, in a large batch."""


Slopes = tuple[Tensor, Tensor]
More = tuple[float | Tensor, float | Tensor]
"""what is added to log pi of chosen responses, and of rejected ones"""


@runtime_checkable
class Known(Protocol):
    """What need not be asked of a loss."""

    def at(self, asked: Drawn, log_pi: Tensor, block: Block, more: More) -> Slopes | None:
        """The loss's derivatives by log pi of both; None where it is to be asked."""


def blocks_of(loss: PairSlopes, log_mu: Float[Tensor, "N"]) -> Iterator[Block]:
    """All pairs that are drawn, so many at a time."""
    n = len(log_mu)
    size = max(1, PAIRS // n)
    for first in range(0, n, size):
        chosen = torch.arange(first, min(n, first + size))
        p = loss.chances(log_mu, chosen)
        drawn = (p > 0).flatten()
        if bool(drawn.any()):
            here = slice(first, first + len(chosen))
            yield Block(here, p, None if bool(drawn.all()) else drawn)


@dataclass(frozen=True)
class Drawn:
    """All pairs of responses that are ever drawn, and the loss of them.

    Attributes:
        known: what of the loss need not be asked: :class:`rl_ebm.studies.losses.surfaces.Surface`.
    """

    loss: PairSlopes
    log_mu: Float[Tensor, "N"]
    mean_count: float
    known: Known | None = None

    @classmethod
    def by(cls, loss: PairSlopes, log_mu: Float[Tensor, "N"], known: Known | None = None) -> Drawn:
        return cls(loss, log_mu, loss.mean_count(log_mu), known)

    def blocks(self) -> Iterator[Block]:
        """Of all pairs."""
        if len(self.log_mu) ** 2 > KEPT:
            return blocks_of(self.loss, self.log_mu)
        return iter(self._kept)

    @cached_property
    def _kept(self) -> list[Block]:
        return list(blocks_of(self.loss, self.log_mu))

    def few(self) -> Block:
        """Some of them, of which a loss is asked what it goes by."""
        block = next(blocks_of(self.loss, self.log_mu))  # the others are not made for this
        n = block.p.numel()
        return block if n <= FEW else block.some(block.flat(_every(n, FEW).view_as(block.p)))

    def at(self, log_pi: Tensor, block: Block, more: More = (0.0, 0.0)) -> Slopes:
        """The loss's derivatives by log pi of both, with something added to them."""
        found = None if self.known is None else self.known.at(self, log_pi, block, more)
        return self.asked(log_pi, block, more) if found is None else found

    def asked(self, log_pi: Tensor, block: Block, more: More = (0.0, 0.0)) -> Slopes:
        """The same by the loss itself."""
        x, y = (value + m for value, m in zip(block.both(log_pi), more, strict=True))
        return self.loss.slopes(x, y, block, self.mean_count)

    def first(self, log_pi: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Expected derivatives by log pi of each."""
        found = torch.zeros_like(self.log_mu)
        for block in self.blocks():
            add_first(found, block, self.at(log_pi, block))
        return found

    @cached_property
    def apart(self) -> bool:
        """Whether how far apart the two are is all that counts, where it is tried: at two laws.

        Not at one of interest: there a slope may be 0 by chance, and not stay so.
        """
        generator, block = torch.Generator().manual_seed(0), self.few()
        try:
            for nats in TRIED:
                noise = torch.randn(self.log_mu.shape, generator=generator, dtype=torch.float64)
                x, y = self.at(torch.log_softmax(nats * noise, 0), block)
                if not torch.equal(x, -y):
                    return False
        except LossError:
            return False
        return True


def _every(n: int, few: int) -> Bool[Tensor, "n"]:
    """So few of n, as far from each other."""
    return torch.arange(n) % -(-n // few) == 0


def add_first(found: Float[Tensor, "N"], block: Block, slopes: Slopes) -> None:
    """Expected derivatives of these pairs, by log pi of each response."""
    x, y = (block.weighted(g) for g in slopes)
    found[block.chosen] += x.sum(1)
    found += y.sum(0)


def off_laws(first: Float[Tensor, "N"], log_pi: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """What of it moves a law: a common number at all responses does not."""
    return first - log_pi.exp() * first.sum()


@dataclass(frozen=True)
class How:
    """How slopes are taken.

    Attributes:
        centred: by differences to both sides.
        apart: of a loss that goes by how far apart the two are, which one difference tells.
    """

    centred: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Slope:
    """Expected derivatives by log pi, and theirs."""

    first: Float[Tensor, "N"]
    second: Float[Tensor, "N N"]

    @classmethod
    def none(cls, n: int) -> Slope:
        first, second = (torch.zeros(shape, dtype=torch.float64) for shape in ((n,), (n, n)))
        return cls(first, second)

    def add(self, block: Block, slopes: Slopes) -> None:
        add_first(self.first, block, slopes)

    def add_second(
        self, block: Block, small: float, at: Callable[[More], Slopes], here: Slopes, how: How
    ) -> None:
        """By differences of this step, first of the chosen response and then of the other.

        Args:
            here: without one.
        """

        def by(x: float, y: float) -> tuple[Float[Tensor, "n N"], Float[Tensor, "n N"]]:
            low, over = (at((-x, -y)), 2 * small) if how.centred else (here, small)
            a, b = (
                block.weighted((high - g) / over) for g, high in zip(low, at((x, y)), strict=True)
            )
            return a, b

        chosen, own = block.chosen, self.second.diagonal()
        a, b = by(small, 0.0)
        own[chosen] += a.sum(1)
        self.second[:, chosen] += b.T
        alone = how.apart and torch.equal(here[0], -here[1])
        a, b = (-a, -b) if alone else by(0.0, small)
        self.second[chosen] += a
        own += b.sum(0)

    def on_laws(self, log_pi: Tensor, mu: Tensor) -> Tensor:
        """Derivative of :func:`off_laws`, by steps that keep a law one: rows sum to mu."""
        pi = log_pi.exp()
        found = torch.addr(self.second, pi, self.second.sum(0), alpha=-1.0).addr_(mu, pi)
        found.diagonal().sub_(pi * self.first.sum())
        return found
