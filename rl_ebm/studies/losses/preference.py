"""The expected gradient of a preference loss, of all pairs of responses at once.

Two responses are drawn from one law, and y is chosen over y' with the probability
sigmoid(R(y) - R(y')), R in reward units (Bradley and Terry 1952).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.studies.losses.contract import Inputs, LossError
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.rows import Rows

NAMES = ("chosen_log_pi", "rejected_log_pi", "chosen_log_ref", "rejected_log_ref")
PAIRS = 2**17
"""pairs that a loss is given at a time"""
SMALL = 1e-4
"""step of a difference, nats"""
NEWTON = 40
"""steps of Newton's, at most"""
LARGEST = 3.0
"""nats that log pi of a response moves in one of them, at most"""


@dataclass(frozen=True)
class Preference:
    """A loss, and who draws the pairs.

    Attributes:
        drawn: log pi of who draws, (S, A); None for the policy itself.
    """

    responses: Responses
    rows: Rows
    drawn: Float[Tensor, "S A"] | None

    def who_draws(self, theta: Tensor) -> Float[Tensor, "S A"]:
        return normalised(theta, self.responses.start) if self.drawn is None else self.drawn

    @property
    def cost(self) -> int:
        """Pairs that the loss is given for one field."""
        return len(self.responses.reward) ** 2

    def slopes(
        self,
        log_pi: Float[Tensor, "N"],
        chosen: Int64[Tensor, "n"],
        more: tuple[float, float] = (0.0, 0.0),
    ) -> tuple[Float[Tensor, "n N"], Float[Tensor, "n N"]]:
        """The loss's derivative by log pi of chosen responses and of those rejected, all others.

        Args:
            more: added to log pi of both.
        """
        log_ref, shape = self.responses.log_ref.sum(1), (len(chosen), len(log_pi))

        def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
            return x[chosen, None].expand(shape).reshape(-1), x.expand(shape).reshape(-1)

        given = [x + y for x, y in zip(pairs(log_pi), more, strict=True)]
        counts = torch.ones(1, dtype=torch.float64).expand(shape[0] * shape[1])
        inputs: Inputs = (*given, *pairs(log_ref))
        first, second = self.rows.gradients(inputs, counts, 1.0)
        return first.view(shape), second.view(shape)

    def chances(
        self, log_mu: Float[Tensor, "N"], chosen: Int64[Tensor, "n"]
    ) -> Float[Tensor, "n N"]:
        """Probability that a pair is (chosen, rejected); they sum to 1 over all."""
        reward = self.responses.reward
        wins: Tensor = torch.sigmoid(reward[chosen, None] - reward)
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
        found = torch.zeros_like(log_mu)
        for chosen in self.blocks():
            p = self.chances(log_mu, chosen)
            first, second = self.slopes(log_pi, chosen)
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
        """Logits where the gradient vanishes, by Newton's method; None where it fails.

        Any law over the responses is a policy. So the unknowns are log pi of each response: a pair
        whose order is plain hardly curves the loss, and what goes by its gradient alone takes
        exp(largest gap of R) steps. Where the policy itself draws, that law moves as well, and this
        is not tried.
        """
        r = self.responses
        if self.drawn is None:
            return None
        log_mu, log_pi = r.log_law(self.drawn), r.log_law(normalised(theta, r.start))
        # A loss of differences alone has no level; and its sum is 0 wherever it stands.
        level = log_mu.exp()[:, None] * log_mu.exp()
        before = math.inf
        for _ in range(NEWTON):
            try:
                found, slope = self._curvature(log_pi, log_mu)
            except LossError:
                return None
            off = found - log_pi.exp() * found.sum()
            size = float((off / log_mu.exp()).abs().max())
            if size <= rest or (size <= 1e3 * rest and size >= before / 2):
                return r.logits(log_pi)
            if size > 10 * before:
                return None
            before = size
            pi = log_pi.exp()[:, None]
            slope = slope - pi * slope.sum(0) - torch.diag(log_pi.exp() * found.sum())
            step, info = torch.linalg.solve_ex(slope + level, -off)
            if int(info) or not bool(torch.isfinite(step).all()):
                return None
            longest = float(step.abs().max())
            log_pi = torch.log_softmax(log_pi + step * min(1.0, LARGEST / longest), 0)
        return None

    def _curvature(
        self, log_pi: Float[Tensor, "N"], log_mu: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N N"]]:
        """Expected derivatives by log pi, and theirs, by differences."""
        found = torch.zeros_like(log_mu)
        slope = torch.zeros(len(log_pi), len(log_pi), dtype=torch.float64)
        diagonal = slope.diagonal()
        for chosen in self.blocks():
            p = self.chances(log_mu, chosen)
            first, second = self.slopes(log_pi, chosen)
            found[chosen] += (p * first).sum(1)
            found += (p * second).sum(0)
            p = p / SMALL
            a, b = self.slopes(log_pi, chosen, (SMALL, 0.0))
            c, d = self.slopes(log_pi, chosen, (0.0, SMALL))
            diagonal[chosen] += (p * (a - first)).sum(1)
            diagonal += (p * (d - second)).sum(0)
            slope[chosen] += p * (c - first)
            slope[:, chosen] += (p * (b - second)).T
        return found, slope
