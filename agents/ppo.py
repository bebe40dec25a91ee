r"""Clipped policy gradients: PPO without a critic, and GRPO, several steps on each batch.

With rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) and the advantage A of the whole response,

    loss = mean_i sum_t ( - min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) + [kl_in = loss] kappa_t )

Schulman et al. 2017 (arXiv 1707.06347, Eq. 7); GRPO (Shao et al. 2024, arXiv 2402.03300, Eq. 3)
has group-std advantages, k3 in the loss and the mean over each response's tokens. TRL before 1.10
adds k3 as it is; from 1.10 on it is multiplied by rho_t (``kl_weight="ratio"``). The first
step on a batch is the plain policy gradient, so that a fixed point is one of that:
:mod:`rl_ebm.fixed_points.penalties`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.kl_penalty import (
    PenaltyOptions,
    advantages,
    fixed_point,
    kl_terms,
    token_weights,
)
from rl_ebm.agents.shared.on_policy import OnPolicyAgent
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.tokens import Batch


@checked_options
class PPOConfig(PenaltyOptions):
    """Options of the agents ``ppo`` and ``grpo``."""

    clip: float | int = 0.2
    """eps: how far from 1 a ratio still counts"""
    epochs: int = 4
    """gradient steps on each batch"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must be in (0, 1), got {self.clip}")
        if not 1 <= self.epochs <= 1000:
            raise ValueError(f"epochs must be >= 1 and at most 1000, got {self.epochs}")


@checked_options
class GRPOConfig(PPOConfig):
    """Options of the agent ``grpo``."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimate of KL(policy, reference)"""
    kl_in: Literal["reward", "loss"] = "loss"
    """whether it is paid as a reward is, or added to the loss with its own gradient"""
    advantage: Literal["none", "group-std"] = "group-std"
    """group-std divides the advantages by the standard deviation of their group (GRPO)"""
    reduce_tokens: Literal["sum", "mean"] = "mean"
    """sum over the tokens of a response, or their mean (which weighs short responses up)"""


def clipped_loss(
    log_pi: Float[Tensor, "B T"],
    log_pi_old: Float[Tensor, "B T"],
    log_ref: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B"],
    lengths: Int64[Tensor, "B"],
    options: PPOConfig,
) -> Float[Tensor, ""]:
    """The loss of the module's docstring, mean over the responses.

    Args:
        log_pi: of the tokens, with gradient; 0 past the end, as the other two.
        log_pi_old: of the tokens when they were drawn.
        log_ref: log p_ref of the tokens.
        advantage: of each response, nats, without gradient.
    """
    ratio = (log_pi - log_pi_old).exp()
    near = ratio.clamp(1 - options.clip, 1 + options.clip)
    loss = -torch.minimum(ratio * advantage[:, None], near * advantage[:, None])
    if options.kl_in == "loss":
        loss = loss + kl_terms(log_pi, log_ref, lengths, options, log_pi_old)
    return (token_weights(lengths, loss, options) * loss).sum(1).mean()


class PPOAgent(OnPolicyAgent):
    """Several clipped steps on each batch of the policy's own samples."""

    Config = PPOConfig

    @property
    def epochs(self) -> int:
        """Gradient steps on each batch."""
        epochs: int = self.config.epochs
        return epochs

    def loss(
        self,
        batch: Batch,
        log_pi: Float[Tensor, "B T"],
        log_pi_old: Float[Tensor, "B T"],
        log_ref: Float[Tensor, "B T"],
        gain: Float[Tensor, "B"],
    ) -> Tensor:
        """The clipped loss of the policy's responses."""
        cfg, ids, p = self.config, batch.prompt_ids, self.ebm.num_prompts
        kappa = kl_terms(log_pi_old, log_ref, batch.lengths, cfg).sum(1)
        returns = gain - kappa if cfg.kl_in == "reward" else gain
        advantage = advantages(returns, ids, p, cfg, self.ebm.beta)
        return clipped_loss(log_pi, log_pi_old, log_ref, advantage, batch.lengths, cfg)


class GRPOAgent(PPOAgent):
    """PPO's step with GRPO's options."""

    Config = GRPOConfig


ENTRIES = {
    "ppo": AgentEntry(
        PPOAgent,
        PPOConfig,
        "clipped policy gradient, several steps a batch, no critic; by default k1 in the reward",
        "Schulman et al. 2017, arXiv 1707.06347",
        fixed_point=fixed_point,
        variants=(
            {"kl_estimator": "k1", "kl_in": "reward", "kl_level": "token", "advantage": "none"},
        ),
    ),
    "grpo": AgentEntry(
        GRPOAgent,
        GRPOConfig,
        "PPO's step with advantages over the group's sigma, k3 in the loss",
        "Shao et al. 2024, arXiv 2402.03300",
        fixed_point=fixed_point,
        variants=(
            {"kl_estimator": "k3", "kl_in": "loss", "kl_level": "token", "advantage": "group-std"},
            {
                "kl_estimator": "k3",
                "kl_in": "loss",
                "kl_level": "token",
                "advantage": "group-std",
                "kl_weight": "ratio",
            },
        ),
    ),
}
