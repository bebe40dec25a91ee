r"""The expected gradient of a policy-gradient loss, of all responses at once.

With c(y, t) the loss's own derivative by log pi(y_t|s_t), and mu the law that draws,

    d E[loss] / d theta(s, a) = C(s, a) - pi(a|s) sum_b C(s, b),
    C(s, a) = sum of mu(y) c(y, t) over the y that take a at s.

The draws are held fixed, as in every such loss: their law has no gradient. What is rarer than
exp(:data:`LOWEST`) is gone, with whatever its loss would be (a k3 paid as a reward grows as fast as
the draws that pay it get rare, and would push for ever).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.studies.losses.advantages import Advantages
from rl_ebm.studies.losses.contract import Inputs
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.rows import Rows

NAMES = ("log_pi", "log_pi_old", "log_ref", "advantages", "mask")

LOWEST = -600.0
"""log-probability of a response below which the loss is told no less: exp(-u) leaves float64"""


@dataclass(frozen=True)
class PolicyGradient:
    """A loss, its advantages, and who draws.

    Attributes:
        drawn: log pi of who draws, (S, A); None for the policy itself.
        group: responses in a group; None for groups without end.
        inner: gradient steps on each batch, with ``log_pi_old`` held, and
        rate: the length of each.
        scaled: whether its gradient is proportional to the advantages. Dividing them by a standard
            deviation then changes the time of the flow alone, and nothing is divided: at the end
            it is 0 where all returns are alike.
        recomputed: whether ``log_pi_old`` is the policy's own, whoever drew.
        rounded: whether who draws reads logits in bfloat16: "no", "uncorrected" or "corrected"
            (gradients are weighed by the ratio of the policy and of who drew, at most 2).
    """

    responses: Responses
    rows: Rows
    advantages: Advantages
    drawn: Float[Tensor, "S A"] | None = None
    group: int | None = None
    inner: int = 1
    rate: float = 0.0
    recomputed: bool = False
    rounded: str = "no"
    scaled: bool = False

    def weights(self, theta: Tensor, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """c(y, t) of every token, and log mu.

        Args:
            held: log pi of who drew, (S, A); None for :meth:`who_draws`.
        """
        r = self.responses
        log_pi = self.floored(r.at_tokens(normalised(theta, r.start)))
        drawn = self.who_draws(theta) if held is None else held
        log_mu = r.log_law(drawn)
        old = log_pi
        if not self.recomputed:
            old = self.floored(r.at_tokens(drawn))
        inputs = self.inputs(log_pi, old, log_mu)
        (c,) = self.rows.gradients(inputs, r.lengths, float(log_mu.exp() @ r.lengths))
        if self.rounded == "corrected":
            c = c * (log_pi - r.at_tokens(drawn)).exp().clamp(max=2.0)
        return c, log_mu

    def floored(self, log_pi: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        """What the loss is told of it."""
        return log_pi.clamp(min=LOWEST / self.responses.mask.shape[1])

    def inputs(self, log_pi: Tensor, old: Tensor, log_mu: Tensor) -> Inputs:
        """What the loss is given, of every response."""
        r = self.responses
        returns = self.advantages.of_each(r.reward, old, r.log_ref, r.mask)
        known = self.advantages
        if self.scaled and self.group is None and known.combine == "std":
            known = replace(known, combine="mean")
        gain = known.in_group(returns, log_mu, self.group)
        gain = gain if gain.ndim == 2 else gain[:, None].expand(r.mask.shape)
        return log_pi, old, r.log_ref, gain.masked_fill(~r.mask, 0.0), r.mask

    def who_draws(self, theta: Tensor) -> Float[Tensor, "S A"]:
        """log pi of it."""
        r = self.responses
        if self.drawn is not None:
            return self.drawn
        log_pi = normalised(theta, r.start)
        if self.rounded != "no":
            return normalised(log_pi.bfloat16().double(), r.start)
        return log_pi

    @property
    def cost(self) -> int:
        """Rows that the loss is given for one field."""
        return len(self.responses.reward) * self.inner

    def rest_near(self, theta: Tensor, rest: float) -> None:
        """The steps of :mod:`rl_ebm.studies.losses.limit` get there."""

    @property
    def kinks_first(self) -> bool:
        """There is no such method."""
        return False

    def is_minimum(self, theta: Tensor, kink: bool = False) -> bool:
        """None is known to be."""
        return False

    def rest_on_kinks(self, theta: Tensor, within: float = math.inf) -> None:
        """Those of :mod:`rl_ebm.studies.losses.slide` do."""

    def field(self, theta: Float[Tensor, "S A"]) -> tuple[Tensor, Tensor]:
        """Expected gradient by theta, and the mass of each action under who draws."""
        r, held = self.responses, self.who_draws(theta)
        return self.steps(theta, held, self.inner) / self.inner, r.mass(r.log_law(held))

    def steps(self, theta: Tensor, held: Tensor, count: int) -> Float[Tensor, "S A"]:
        """Sum of the gradients of some steps on one batch, whose draws are of ``held``.

        They are added up: the way from theta would lose what is small beside its logits.
        """
        r, moved, total = self.responses, theta, torch.zeros_like(theta)
        for _ in range(count):
            c, log_mu = self.weights(moved, held)
            first = r.gradient(log_mu.exp()[:, None] * c, normalised(moved, r.start))
            total = total + first
            moved = moved - self.rate * first
        return total
