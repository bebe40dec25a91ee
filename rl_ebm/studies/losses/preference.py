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
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.messages.arguments import finite, shown
from rl_ebm.studies.losses.contract import Inputs, LossError
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.rows import Rows

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
PAIRS = 2**17
"""pairs that a loss is given at a time"""
SMALL = 1e-4
"""step of a difference, nats; and"""
ROUGH_SMALL = (1e-2, 1e-3)
"""of a loss that computes in float32: one that bends more takes the shorter"""
IMPLICIT = 120
"""implicit steps, at most"""
LARGEST = 1.0
"""nats that log pi of a response moves in one of them, at most"""
RATE = 1.0
"""one over the length of the first, in units of the loss's own curvature, and"""
FASTER = 8.0
"""by how much the next is longer, where it may"""
GONE = -60.0
"""nats that a response falls before it may be dead, which these steps do not see"""


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


def count_of(counted: Counted | None, chosen: Tensor, rejected: Tensor) -> Tensor:
    """What the rows of a batch may share of pairs with these lengths."""
    if counted is None:
        return torch.ones_like(chosen)
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
        self,
        log_pi: Float[Tensor, "N"],
        chosen: Int64[Tensor, "n"],
        mean_count: float,
        more: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[Float[Tensor, "n N"], Float[Tensor, "n N"]]:
        """The loss's derivative by log pi of chosen responses and of those rejected, all others.

        Args:
            mean_count: of what is counted, :meth:`mean_count` of the law that draws.
            more: added to log pi of both.
        """
        log_ref, shape = self.responses.log_ref.sum(1), (len(chosen), len(log_pi))

        def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
            return x[chosen, None].expand(shape).reshape(-1), x.expand(shape).reshape(-1)

        given = [x + y for x, y in zip(pairs(log_pi), more, strict=True)]
        lengths = pairs(self.responses.lengths)
        inputs: Inputs = (*given, *pairs(log_ref))
        if self.counted is not None:
            inputs = (*inputs, *(x.long() for x in lengths))
        first, second = self.rows.gradients(inputs, count_of(self.counted, *lengths), mean_count)
        return first.view(shape), second.view(shape)

    def mean_count(self, log_mu: Float[Tensor, "N"]) -> float:
        """Of a pair, in a large batch."""
        if self.counted is None:
            return 1.0
        lengths, total = self.responses.lengths, 0.0
        for chosen in self.blocks():
            counts = count_of(self.counted, lengths[chosen, None], lengths)
            total += float((self.chances(log_mu, chosen) * counts).sum())
        return total

    def chances(
        self, log_mu: Float[Tensor, "N"], chosen: Int64[Tensor, "n"]
    ) -> Float[Tensor, "n N"]:
        """Probability that a pair is (chosen, rejected); they sum to 1 over all."""
        wins = self.pairs.wins(self.responses.reward, chosen)
        return 2 * (log_mu[chosen].exp()[:, None] * log_mu.exp()) * wins

    def blocks(self) -> tuple[Tensor, ...]:
        """The chosen ones, so many that their pairs are made at a time."""
        n = len(self.responses.reward)
        parts: tuple[Tensor, ...] = torch.arange(n).split(max(1, PAIRS // n))
        return parts

    def weights(self, theta: Tensor) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        """Expected derivative by log pi of each response, mu in it; log mu."""
        r = self.responses
        log_mu = r.log_law(self.who_draws(theta))
        log_pi = r.log_law(normalised(theta, r.start))
        found, mean = torch.zeros_like(log_mu), self.mean_count(log_mu)
        for chosen in self.blocks():
            p = self.chances(log_mu, chosen)
            first, second = self.slopes(log_pi, chosen, mean)
            found[chosen] += (p * first).sum(1)
            found += (p * second).sum(0)
        return found, log_mu

    def field(self, theta: Float[Tensor, "S A"]) -> tuple[Tensor, Tensor]:
        """Expected gradient by theta, and the mass of each action under who draws."""
        found, log_mu = self.weights(theta)
        r = self.responses
        values = found[:, None].expand(r.mask.shape)
        return r.gradient(values, normalised(theta, r.start)), r.mass(log_mu)

    def rest_near(self, theta: Float[Tensor, "S A"], rest: float) -> Tensor | None:
        """Logits where the gradient vanishes, down an implicit flow; None where it fails.

        Any law over the responses is a policy. So the unknowns are log pi of each response, and
        they follow their gradient in units of how often each is drawn: a pair whose order is plain
        hardly curves the loss, and what goes by its gradient alone takes exp(largest gap of R)
        steps. Steps are Euler's, backward, each as long as moves no log pi by more than
        :data:`LARGEST`: the last ones are Newton's. Where the policy itself draws, that law moves
        as well, and this is not tried.
        """
        if self.drawn is None:
            return None
        for small in ROUGH_SMALL if self.rows.rough else (SMALL,):
            found = self._rest_near(theta, self.drawn, rest, small)
            if found is not None:
                return found
        return None

    def _rest_near(self, theta: Tensor, drawn: Tensor, rest: float, small: float) -> Tensor | None:
        """The same, with differences of this step."""
        r = self.responses
        log_mu, log_pi = r.log_law(drawn), r.log_law(normalised(theta, r.start))
        lowest = float(log_pi.min()) + GONE
        before, rate = math.inf, 0.0
        for _ in range(IMPLICIT):
            try:
                found, slope = self._curvature(log_pi, log_mu, small)
            except LossError:
                return None
            pi = log_pi.exp()
            off = found - pi * found.sum()
            size = float((off / log_mu.exp()).abs().max())
            slope = slope - pi[:, None] * slope.sum(0) - torch.diag(pi * found.sum())
            # The rows of a slope add up to 0, so that this asks for pi @ step = 0: a law stays one.
            slope += log_mu.exp()[:, None] * pi
            units = (log_mu.exp() + pi) / 2
            if size <= rest or (size <= 1e3 * rest and size >= before / 2):
                return r.logits(_newton(log_pi, slope, off))
            before = size
            rate = rate or RATE * float((slope.diagonal().abs() / units).max())
            step, rate = _implicit(slope, off, units, rate / FASTER)
            if not bool(torch.isfinite(step).all()):
                return None
            log_pi = torch.log_softmax(log_pi + step, 0)
            if float(log_pi.min()) < lowest:
                return None
        return None

    def _curvature(
        self, log_pi: Float[Tensor, "N"], log_mu: Float[Tensor, "N"], small: float
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N N"]]:
        """Expected derivatives by log pi, and theirs, by differences of this step."""
        found = torch.zeros_like(log_mu)
        slope = torch.zeros(len(log_pi), len(log_pi), dtype=torch.float64)
        diagonal, mean = slope.diagonal(), self.mean_count(log_mu)
        for chosen in self.blocks():
            p = self.chances(log_mu, chosen)
            first, second = self.slopes(log_pi, chosen, mean)
            found[chosen] += (p * first).sum(1)
            found += (p * second).sum(0)
            p = p / small
            a, b = self.slopes(log_pi, chosen, mean, (small, 0.0))
            c, d = self.slopes(log_pi, chosen, mean, (0.0, small))
            diagonal[chosen] += (p * (a - first)).sum(1)
            diagonal += (p * (d - second)).sum(0)
            slope[chosen] += p * (c - first)
            slope[:, chosen] += (p * (b - second)).T
        return found, slope


def _implicit(
    slope: Float[Tensor, "N N"], off: Float[Tensor, "N"], units: Float[Tensor, "N"], rate: float
) -> tuple[Tensor, float]:
    """A backward step, shortened until no entry moves by more than :data:`LARGEST`; its rate."""
    while True:
        step, info = torch.linalg.solve_ex(slope + torch.diag(rate * units), -off)
        if int(info):
            return torch.full_like(step, torch.nan), rate
        if float(step.abs().max()) <= LARGEST or rate > 1e6:
            return step.clamp(-LARGEST, LARGEST), rate
        rate = max(4 * rate, 1e-8)


def _newton(
    log_pi: Float[Tensor, "N"], slope: Float[Tensor, "N N"], off: Float[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """The rest, one step further than implicit ones get: what they shorten them by is left out."""
    step, info = torch.linalg.solve_ex(slope, -off)
    small = not int(info) and float(step.abs().max()) <= LARGEST
    return torch.log_softmax(log_pi + step, 0) if small else log_pi
