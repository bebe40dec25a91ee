r"""KL-regularised REINFORCE with a leave-one-out baseline (RLOO), the KL as k1 in the reward.

For k responses y_i ~ pi to a prompt, with the sequence-level return (nats)

    G_i = R(x, y_i) / beta + log p_ref(y_i|x) - log pi(y_i|x)

    loss = - mean_i (G_i - mean_{j != i} G_j) log pi(y_i|x),    G without gradient,

whose expected gradient is that of KL(pi, p*), so that its fixed point is the EBM.
Kool et al. 2019 (https://openreview.net/forum?id=r1lgTGL5DE); Ahmadian et al. 2024
(arXiv 2402.14740). Sums over tokens, no normalisation by length or by standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.learner import (
    Learner,
    check_batch_size,
    check_finite_weights,
    check_rates,
    draw_prompts,
    immediate_log_weights,
)
from rl_ebm.ebm import EBM
from rl_ebm.policies.scoring import Policy, Trainable, q_values, sample
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Options of the agent ``policy-gradient``."""

    batch_size: int = 4096
    """responses in a step"""
    group_size: int = 8
    """responses to each prompt of a step, at least; the baseline is the mean of the others"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""
    forbidden_log_weight: float | int | None = None
    """log-weight trained on in the place of -inf, nats"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        if not 2 <= self.group_size <= self.batch_size:
            raise ValueError(
                f"group_size must be in [2, batch_size={self.batch_size}], got {self.group_size}: "
                "the baseline of a response is the mean of the others"
            )
        check_batch_size("batch_size", self.batch_size)


def leave_one_out(
    returns: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], num_prompts: int = 1
) -> Float[Tensor, "B"]:
    """Return less the mean return of the other responses to the same prompt."""
    ones = torch.ones_like(returns)
    zero = returns.new_zeros(num_prompts)
    total = zero.index_add(0, prompt_ids, returns)[prompt_ids]
    count = zero.index_add(0, prompt_ids, ones)[prompt_ids]
    return returns - (total - returns) / (count - 1).clamp(min=1)


def policy_gradient_loss(
    log_pi: Float[Tensor, "B"],
    log_weight: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int = 1,
) -> Float[Tensor, ""]:
    """The surrogate whose gradient is the RLOO estimate of that of KL(pi, p*).

    Args:
        log_pi: log pi(y|x) of responses drawn from pi, with gradient.
        log_weight: log p_ref(y|x) + R / beta of each.
        prompt_ids: which prompt each answers.
    """
    advantage = leave_one_out(log_weight - log_pi.detach(), prompt_ids, num_prompts)
    return -(advantage * log_pi).mean()


class PolicyGradientAgent:
    """RLOO on the policy's own samples."""

    logits_are_values = False

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: PolicyGradientConfig | None = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        self.config = PolicyGradientConfig() if config is None else config
        check_finite_weights(ebm, self.config.forbidden_log_weight, teacher)
        ebm.check_policy(policy)
        self.ebm, self.policy = ebm, policy
        self.generator = torch.Generator(ebm.device) if generator is None else generator
        self.learner = Learner(policy, self.config.lr, self.config.max_grad_norm)

    def sample(self) -> Batch | None:
        """Responses of the policy itself, in groups that share a prompt."""
        n, p = self.config.batch_size, self.ebm.num_prompts
        prompt_ids = draw_prompts(n, p, self.config.group_size, self.generator)
        return sample(self.policy, self.ebm.space, n, self.generator, prompt_ids)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on responses of the current policy, with their rewards."""
        batch = batch.clean()
        p = self.ebm.num_prompts
        log_weight = immediate_log_weights(self.ebm, batch, self.config.forbidden_log_weight).sum(1)
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_pi = sequence_log_prob(log_policy(q), batch.tokens, batch.lengths)
        loss = policy_gradient_loss(log_pi, log_weight, batch.prompt_ids, p)
        # E[log-weight - log pi] is the ELBO of log Z (arXiv 2512.15605, App. A.8).
        metrics = {
            "losses/loss": loss.detach(),
            "losses/elbo": (log_weight - log_pi.detach()).mean(),
        }
        return metrics | self.learner.descend(loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
