r"""Monte-Carlo regression on rollouts of the reference: Q* = log E_ref exp(R / beta).

With f = q - log p_ref the logits less the reference's,

    f*(s, a) = log E[exp(g) | s, a],    g = R / beta,  the rest of the response drawn from p_ref,

so that no value of the policy, and no bootstrap, is in the target: what Q# (Zhou et al. 2025,
arXiv 2502.20548, Sec. 3) learns as a distribution of returns, here as its exponential mean.

    loss = mean_i sum_t ( exp(f_t - c_t) - exp(g_i - c_t) f_t )

has its minimum where exp f is the mean of exp g, whatever the constants c; c_t is the largest log
of the mean of exp g over a batch so far, for each prompt and position, and gives every position a
gradient of the same size. Without a reference the rollouts are uniform, and each later token weighs
by its number of alternatives: with one constant the first tokens would drown the last.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.learner import log_mean_exp, token_values
from rl_ebm.agents.shared.off_policy import OffPolicyAgent, OffPolicyOptions
from rl_ebm.agents.shared.off_policy import fixed_point as off_policy_fixed_point
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import FixedPoint, Problem
from rl_ebm.policies.base import Policy
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, length_mask

LARGEST = 30.0
"""of an exponent; beyond it exp goes on along its tangent, and still pulls f back"""


@checked_options
class MonteCarloConfig(OffPolicyOptions):
    """Options of the agent ``monte-carlo``."""

    explore: float | int = 1.0
    """share of the responses drawn from the reference: all of them, or the target is another"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.explore != 1:
            raise ValueError(
                f"explore must be 1: the target is of the reference, got {self.explore}"
            )


def monte_carlo_loss(
    f: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    c: Float[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """The loss of the module's docstring: sum over real tokens, mean over rows.

    Args:
        f: q(s_t, a_t) - log p_ref(a_t|s_t), with gradient.
        returns: log of the weight of what follows the token, g included.
        c: the constants of each row's prompt, nats.
    """
    past = ~length_mask(lengths, f.shape[1])
    f, returns, c = (x.masked_fill(past, 0.0) for x in (f, returns, c))
    x = f - c
    tangent = 1 + (x - LARGEST).clamp(min=0.0)
    terms = x.clamp(max=LARGEST).exp() * tangent - (returns - c).clamp(max=LARGEST).exp() * f
    return terms.masked_fill(past, 0.0).sum(1).mean()


def fixed_point(config: MonteCarloConfig, problem: Problem) -> FixedPoint:
    """The EBM: of rollouts of the reference, and of no other policy's."""
    return replace(off_policy_fixed_point(config, problem), sampler=True)


class MonteCarloAgent(OffPolicyAgent):
    """Regression on the reference's rollouts; its raw logits become q*."""

    logits_are_values = True
    Config = MonteCarloConfig
    kept = ("c",)

    def begin(self, teacher: Policy | None) -> None:
        """The constants, of no batch yet."""
        super().begin(teacher)
        shape = (self.ebm.num_prompts, self.ebm.space.max_length)
        self.c = torch.full(shape, -math.inf, device=self.ebm.device)

    def loss(self, batch: Batch, r: Float[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of rollouts, and the log of their mean weight."""
        space = self.ebm.space
        q = q_values(self.policy, space, batch.tokens, batch.prompt_ids)
        with torch.no_grad():
            drawn = q_values(self.explorer, space, batch.tokens, batch.prompt_ids)
            log_drawn = token_values(log_policy(drawn), batch).float()
            log_ref = self.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).float()
            # What follows token t: its rewards, and what its tokens weigh against their draw.
            rest = (r - log_drawn).flip(1).cumsum(1).flip(1)
            returns = rest + log_drawn - log_ref
            log_mean = log_mean_exp(rest[:, 0], batch.prompt_ids, self.ebm.num_prompts)
            self.c = torch.maximum(self.c, self.position_means(returns, batch))
        f = token_values(q, batch) - log_ref
        loss = monte_carlo_loss(f, returns, batch.lengths, self.c[batch.prompt_ids])
        return loss, {"losses/log_mean_weight": log_mean[batch.prompt_ids].mean()}

    def position_means(self, returns: Float[Tensor, "B T"], batch: Batch) -> Float[Tensor, "P T"]:
        """log of the mean of exp returns over each prompt's tokens at each position."""
        cells = self.c.numel()
        index = torch.arange(cells, device=returns.device).view_as(self.c)[batch.prompt_ids]
        index = index.masked_fill(~batch.mask, cells)  # one more cell, for what is past the end
        means = log_mean_exp(returns.flatten(), index.flatten(), cells + 1)
        return means[:-1].view_as(self.c)


ENTRIES = {
    "monte-carlo": AgentEntry(
        MonteCarloAgent,
        MonteCarloConfig,
        "regression of Q* = log E_ref exp(R / beta) on rollouts of the reference (Q#)",
        "Zhou et al. 2025, arXiv 2502.20548",
        fixed_point=fixed_point,
    ),
}
