"""All pairs of responses that are ever drawn: the expected loss of them, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

PAIRS = 2**17
"""pairs that a loss is given at a time"""


@runtime_checkable
class PairSlopes(Protocol):
    """A loss of pairs, drawn by a law that stays."""

    def slopes(
        self,
        x: Float[Tensor, "n"],
        y: Float[Tensor, "n"],
        pairs: tuple[Int64[Tensor, "n"], Int64[Tensor, "n"]],
        mean_count: float,
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """The loss's derivatives by log pi of chosen responses and of rejected ones."""

    def chances(
        self, log_mu: Float[Tensor, "N"], chosen: Int64[Tensor, "n"]
    ) -> Float[Tensor, "n N"]:
        """Probability that a pair is (chosen, rejected)."""

    def mean_count(self, log_mu: Float[Tensor, "N"]) -> float:
        """Of a pair, in a large batch."""


Slopes = tuple[Tensor, Tensor]
Where = tuple[Tensor, Tensor]
More = tuple[float | Tensor, float | Tensor]
"""what is added to log pi of chosen responses, and of rejected ones"""


def pairs_of(
    loss: PairSlopes, log_mu: Float[Tensor, "N"]
) -> Iterator[tuple[Where, Float[Tensor, "n"]]]:
    """Numbers of (chosen, rejected) and their probabilities, so many at a time; none that is 0."""
    n = len(log_mu)
    for chosen in torch.arange(n).split(max(1, PAIRS // n)):
        p = loss.chances(log_mu, chosen)
        row, rejected = (p > 0).nonzero(as_tuple=True)
        yield (chosen[row], rejected), p[row, rejected]


@dataclass(frozen=True)
class Drawn:
    """All pairs of responses that are ever drawn, and the loss of them."""

    loss: PairSlopes
    log_mu: Float[Tensor, "N"]
    mean_count: float

    @classmethod
    def by(cls, loss: PairSlopes, log_mu: Float[Tensor, "N"]) -> Drawn:
        return cls(loss, log_mu, loss.mean_count(log_mu))

    def blocks(self) -> Iterator[tuple[Where, Float[Tensor, "n"]]]:
        """Numbers of (chosen, rejected), and their probabilities."""
        return pairs_of(self.loss, self.log_mu)

    def at(self, log_pi: Tensor, where: Where, more: More = (0.0, 0.0)) -> Slopes:
        """The loss's derivatives by log pi of both, with something added to them."""
        x, y = (log_pi[rows] + m for rows, m in zip(where, more, strict=True))
        return self.loss.slopes(x, y, where, self.mean_count)

    def first(self, log_pi: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Expected derivatives by log pi of each."""
        found = torch.zeros_like(self.log_mu)
        for where, p in self.blocks():
            for rows, g in zip(where, self.at(log_pi, where), strict=True):
                found.index_add_(0, rows, p * g)
        return found


@dataclass(frozen=True)
class Slope:
    """Expected derivatives by log pi, and theirs."""

    first: Float[Tensor, "N"]
    second: Float[Tensor, "N N"]

    @classmethod
    def none(cls, n: int) -> Slope:
        return cls(torch.zeros(n).double(), torch.zeros(n, n).double())

    def add(self, where: Where, p: Tensor, slopes: Slopes) -> None:
        for rows, g in zip(where, slopes, strict=True):
            self.first.index_add_(0, rows, p * g)

    def add_second(
        self,
        where: Where,
        p: Tensor,
        small: float,
        at: Callable[[More], Slopes],
        here: Slopes | None,
    ) -> None:
        """By differences of this step, first of the chosen response and then of the other.

        Args:
            here: where they are taken from; None for as far on the other side.
        """
        for k, more in enumerate(((small, 0.0), (0.0, small))):
            first = at((-more[0], -more[1])) if here is None else here
            over = 2 * small if here is None else small
            for rows, a, b in zip(where, first, at(more), strict=True):
                by = (b - a) / over
                self.second.index_put_((rows, where[k]), p * by, accumulate=True)

    def off(self, log_pi: Tensor) -> Tensor:
        """What of the first moves a law: a common number at all responses does not."""
        return self.first - log_pi.exp() * self.first.sum()

    def on_laws(self, log_pi: Tensor, mu: Tensor) -> Tensor:
        """Derivative of :meth:`off`; its step keeps a law one: its rows add up to 0 without mu."""
        pi = log_pi.exp()
        found = self.second - pi[:, None] * self.second.sum(0) - torch.diag(pi * self.first.sum())
        return found + mu[:, None] * pi
