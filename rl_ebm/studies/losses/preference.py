"""The expected gradient of a preference loss, of all pairs of responses at once.

Two responses are drawn from one law, and y is chosen over y' with the probability
sigmoid(R(y) - R(y')), R in reward units (Bradley and Terry 1952), or wherever R(y) > R(y'). The
draws are held fixed: where the policy itself makes them, their law moves with it, and has no
gradient. A loss that takes six arguments is given how many tokens both have: means over tokens
(SimPO, trl's IPO) are not made of sums alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.messages.arguments import finite, shown
from rl_ebm.studies.losses import backward, pair_rests
from rl_ebm.studies.losses.contract import Inputs
from rl_ebm.studies.losses.drawn_pairs import Block, Drawn, blocks_of
from rl_ebm.studies.losses.margin_rests import Margins
from rl_ebm.studies.losses.margins import Jumps
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.rows import Rows
from rl_ebm.studies.losses.surfaces import MANY, Surface

NAMES = ("chosen_log_pi", "rejected_log_pi", "chosen_log_ref", "rejected_log_ref")
LENGTHS = ("chosen_length", "rejected_length")
Counted = Literal["both", "chosen", "rejected"]
COUNTED: tuple[Counted, ...] = ("both", "chosen", "rejected")
"""whose tokens the rows of a batch may share"""
Labels = Literal["bradley-terry", "higher"]
EQUAL = 1e-12
"""of the spread of R, what is no difference of two; and"""
ROUNDED = 4e-16
"""of the largest R"""
SMALL = 1e-4
"""step of a difference, nats; and"""
CLEAR = 8.0
"""times as far as a rest may be away, the first window that looks for it"""
ROUGH_SMALL = (1e-2, 2e-3)
"""to both sides, of a loss that computes in float32: one that bends more takes the shorter"""


@dataclass(frozen=True)
class Pairs:
    """How pairs are made.

    Attributes:
        labels: "bradley-terry", y is chosen over y' with the probability sigmoid(R - R'); "higher",
            the one whose R is higher is, and either one of two that are equal.
        temperature: at which the policy draws, where it does: logits over it. > 0.

    Raises:
        ValueError: another name, or a temperature that is not above 0.
    """

    labels: str = "bradley-terry"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            known = ", ".join(repr(name) for name in get_args(Labels))
            raise ValueError(f"labels must be one of {known}, got {shown(self.labels)}")
        finite("temperature", self.temperature, 0.0, above=True)

    def wins(self, reward: Float[Tensor, "N"], chosen: Int64[Tensor, "n"]) -> Float[Tensor, "n N"]:
        """Probability that each of these is chosen over each other one; of two, both make 1."""
        gap = reward[chosen, None] - reward
        if self.labels == "bradley-terry":
            return torch.sigmoid(gap)
        spread, largest = reward.max() - reward.min(), reward.abs().max()
        equal = gap.abs() <= torch.maximum(EQUAL * spread, ROUNDED * largest)
        return torch.where(equal, 0.5, (gap > 0).double())


def takes_lengths(function: Callable[..., Any]) -> bool:
    """Whether a loss is called with the lengths of both as well: it has six arguments, not four."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function tells nothing
        return False
    return _binds(signature, NAMES + LENGTHS) and not _binds(signature, NAMES)


def _binds(signature: inspect.Signature, names: tuple[str, ...]) -> bool:
    try:
        signature.bind(*names)
    except TypeError:
        return False
    return True


def count_of(counted: Counted, chosen: Tensor, rejected: Tensor) -> Tensor:
    """What the rows of a batch may share of pairs with these lengths."""
    return {"chosen": chosen, "rejected": rejected, "both": chosen + rejected}[counted]


@dataclass(frozen=True)
class Preference:
    """A loss, and who draws the pairs.

    Attributes:
        drawn: log pi of who draws, (S, A); None for the policy itself.
        counted: whose tokens the rows of a batch share, where the loss is told of lengths.
        pairs: how they are labelled, and how warm the policy draws them.
    """

    responses: Responses
    rows: Rows
    drawn: Float[Tensor, "S A"] | None
    counted: Counted | None = None
    pairs: Pairs = Pairs()

    def who_draws(self, theta: Tensor) -> Float[Tensor, "S A"]:
        """log pi of it."""
        if self.drawn is not None:
            return self.drawn
        return normalised(theta / self.pairs.temperature, self.responses.start)

    @property
    def cost(self) -> int:
        """Pairs that the loss is given for one field."""
        return len(self.responses.reward) ** 2

    def slopes(
        self, x: Float[Tensor, "m"], y: Float[Tensor, "m"], block: Block, mean_count: float
    ) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
        """The loss's derivatives by x, log pi of chosen responses, and by y, of those rejected.

        Args:
            block: which pairs these are.
            mean_count: of what is counted, :meth:`mean_count` of the law that draws.
        """
        inputs: Inputs = (x, y, *block.both(self._log_ref))
        if self.counted is None:
            count = torch.ones_like(x)
        else:
            lengths = block.both(self.responses.lengths)
            inputs = (*inputs, *(n.long() for n in lengths))
            count = count_of(self.counted, *lengths)
        first, second = self.rows.gradients(inputs, count, mean_count)
        return first, second

    @cached_property
    def _log_ref(self) -> Float[Tensor, "N"]:
        return self.responses.log_ref.sum(1)

    def mean_count(self, log_mu: Float[Tensor, "N"]) -> float:
        """Of a pair, in a large batch."""
        if self.counted is None:
            return 1.0
        total = 0.0
        for block in blocks_of(self, log_mu):
            count = count_of(self.counted, *block.both(self.responses.lengths))
            total += float(block.weighted(count).sum())
        return total

    def chances(
        self, log_mu: Float[Tensor, "N"], chosen: Int64[Tensor, "n"]
    ) -> Float[Tensor, "n N"]:
        """Probability that a pair is (chosen, rejected); they sum to 1 over all."""
        wins = self.pairs.wins(self.responses.reward, chosen)
        return 2 * (log_mu[chosen].exp()[:, None] * log_mu.exp()) * wins

    def weights(self, theta: Tensor) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """Expected derivative by log pi of each response, mu in it; log mu."""
        r = self.responses
        log_mu = r.log_law(self.who_draws(theta))
        log_pi = r.log_law(normalised(theta, r.start))
        return self.pairs_of(log_mu).first(log_pi), log_mu

    def pairs_of(self, log_mu: Float[Tensor, "N"]) -> Drawn:
        """All that this law draws."""
        return self._drawn_pairs or Drawn.by(self, log_mu, self._surface)

    @cached_property
    def _drawn_pairs(self) -> Drawn | None:
        """Of a law that stays."""
        return None if self.drawn is None else replace(self._asked, known=self._surface)

    @cached_property
    def _asked(self) -> Drawn:
        """Pairs to ask what the loss goes by: of the reference if the policy draws."""
        r = self.responses
        return Drawn.by(self, self._log_ref if self.drawn is None else r.log_law(self.drawn))

    @cached_property
    def _surface(self) -> Surface | None:
        """Of many pairs, whose rows add up."""
        many = self.cost > MANY and not self.rows.rough
        if not many or self.rows.combination != "rows":
            return None
        return Surface.of(self._asked, self._log_ref, self._jumps)

    @cached_property
    def _jumps(self) -> Jumps | None:
        """Where the pairs' law stays, and rows add up."""
        if self.drawn is None or self.rows.combination != "rows":
            return None
        return Jumps.of(self._asked, self._log_ref, self.rows.rough)

    @cached_property
    def _margins(self) -> Margins | None:
        if self._drawn_pairs is None or self._jumps is None:
            return None
        return Margins(self._drawn_pairs, self._jumps)

    @property
    def kinks_first(self) -> bool:
        """Of a loss whose jumps are known."""
        return self._margins is not None

    def field(self, theta: Float[Tensor, "S A"]) -> tuple[Tensor, Tensor]:
        """Expected gradient by theta, and the mass of each action under who draws."""
        found, log_mu = self.weights(theta)
        r = self.responses
        values = found[:, None].expand(r.mask.shape)
        return r.gradient(values, normalised(theta, r.start)), r.mass(log_mu)

    def rest_near(self, theta: Float[Tensor, "S A"], rest: float) -> tuple[Tensor, float] | None:
        """Logits where the gradient vanishes: :func:`rl_ebm.studies.losses.pair_rests.rest_near`.

        Where the policy itself draws, that law moves as well, and this is not tried.
        """
        if self._drawn_pairs is None:
            return None
        r, rough = self.responses, self.rows.rough
        log_pi = r.log_law(normalised(theta, r.start))
        for small in ROUGH_SMALL if rough else (SMALL,):
            found = pair_rests.rest_near(self._drawn_pairs, log_pi, rest, small, rough)
            if found is not None:
                return r.logits(found[0]), found[1]
        return None

    def is_minimum(self, theta: Float[Tensor, "S A"], kink: bool = False) -> bool:
        """Where the pairs' law stays: by the curvature of all pairs, at kinks by margins alone."""
        if self._drawn_pairs is None or self.rows.rough:
            return False
        r = self.responses
        log_pi = r.log_law(normalised(theta, r.start))
        if kink:
            return self._margins is not None and self._margins.is_minimum(log_pi)
        return backward.is_minimum(self._drawn_pairs, log_pi, SMALL)

    def rest_on_kinks(
        self, theta: Float[Tensor, "S A"], within: float = math.inf
    ) -> tuple[Tensor, float] | None:
        """The same where kinks meet."""
        if self._drawn_pairs is None or (self._surface is not None and self._surface.smooth):
            return None
        r, rough = self.responses, self.rows.rough
        log_pi = r.log_law(normalised(theta, r.start))
        if self._margins is not None:
            lowest = float(log_pi.min()) + pair_rests.GONE
            found = self._margins.rest(log_pi, lowest, rough, CLEAR * within)
        else:
            found = pair_rests.rest_on_kinks(self._drawn_pairs, log_pi, rough, CLEAR * within)
        return None if found is None else (r.logits(found[0]), found[1])
