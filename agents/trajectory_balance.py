r"""Trajectory balance: log Z + log pi(y|x) = log p_ref(y|x) + R / beta, squared.

    loss = mean_i (log Z(x_i) + log pi(y_i|x_i) - sum_t r_t)^2 / 2

Malkin et al. 2022 (arXiv 2201.13259, Eq. 14) learn log Z(x), one number for each prompt here;
VarGrad (Richter et al. 2020, arXiv 2010.10436; Zhang et al. 2023, arXiv 2302.05446) puts the
mean of the batch in its place, prompt by prompt: the loss is then half the variance of the
log-ratio. A response that is alone with its prompt would be its own mean, and teach nothing: a
step draws groups, for some of the prompts where there are many. Both vanish at the EBM alone,
whoever drew the responses (where every one has a chance). Hu et al. 2024 (arXiv 2310.04363) for
language models.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.grouped import GroupedAgent
from rl_ebm.agents.shared.learner import (
    check_group_size,
    check_nats,
    group_ids,
    prompt_means,
)
from rl_ebm.agents.shared.off_policy import OffPolicyOptions, fixed_point
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch


@checked_options
class TrajectoryBalanceConfig(OffPolicyOptions):
    """Options of the agents ``trajectory-balance`` and ``vargrad``."""

    log_z: Literal["learned", "batch"] = "learned"
    """log Z of each prompt: a parameter, or the mean over its responses in the batch (VarGrad)"""
    log_z_start: float | int = 0.0
    """what the learned log Z starts from, nats"""
    group_size: int | None = None
    """with log_z="batch": responses that share a mean, to one prompt; a step has as many whole
    groups as fit. None: all responses to a prompt in the step, at least 4"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nats("log_z_start", self.log_z_start)
        if self.log_z == "batch":
            check_group_size(self.group_size, self.batch_size)
        elif self.group_size is not None:
            raise ValueError(
                "group_size is for log_z='batch': a learned log Z compares no responses with each "
                "other; leave group_size out"
            )


@checked_options
class VarGradConfig(TrajectoryBalanceConfig):
    """Options of the agent ``vargrad``."""

    log_z: Literal["learned", "batch"] = "batch"
    """log Z of each prompt: a parameter, or the mean over its responses in the batch (VarGrad)"""


def trajectory_balance_loss(
    log_z: Float[Tensor, "B"], log_pi: Float[Tensor, "B"], log_weight: Float[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Half the squared residual, mean over the rows.

    Args:
        log_z: of each response's prompt, with gradient where it is learned.
        log_pi: log pi(y|x), with gradient.
        log_weight: log p_ref(y|x) + R / beta.
    """
    return 0.5 * (log_z + log_pi - log_weight).square().mean()


def batch_log_z(
    log_pi: Float[Tensor, "B"],
    log_weight: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int = 1,
) -> Float[Tensor, "B"]:
    """The log Z that fits the batch best: mean of log-weight - log pi over each prompt's rows.

    ``prompt_ids`` and ``num_prompts`` are those of groups where these are smaller than prompts.
    """
    return prompt_means(log_weight - log_pi, prompt_ids, num_prompts)[0]


class TrajectoryBalanceAgent(GroupedAgent):
    """Trajectory balance with a learned log Z for each prompt, or with that of the batch."""

    Config = TrajectoryBalanceConfig

    def extra_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """log Z of every prompt, where it is learned."""
        start = torch.full((self.ebm.num_prompts,), float(self.config.log_z_start))
        self.log_z = torch.nn.Parameter(start.to(self.ebm.device))
        return (self.log_z,) if self.config.log_z == "learned" else ()

    @property
    def compares(self) -> bool:
        """Whether the batch's log Z is its responses'."""
        return bool(self.config.log_z == "batch")

    @property
    def group_size(self) -> int | None:
        """Responses that share a log Z."""
        size: int | None = self.config.group_size
        return size

    def loss(self, batch: Batch, r: Float[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of responses, and the log Z in it."""
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_pi = sequence_log_prob(log_policy(q), batch.tokens, batch.lengths)
        log_weight = r.sum(1)
        if self.config.log_z == "learned":
            log_z = self.log_z[batch.prompt_ids]
        else:
            ids, count = group_ids(batch.prompt_ids, self.ebm.num_prompts, self.config.group_size)
            log_z = batch_log_z(log_pi, log_weight, ids, count)
        loss = trajectory_balance_loss(log_z, log_pi, log_weight)
        return loss, {"losses/log_z": log_z.detach().mean()}

    def learned_log_z(self) -> Float[Tensor, "P"] | None:
        """The parameter, where there is one."""
        return self.log_z.detach() if self.config.log_z == "learned" else None


class VarGradAgent(TrajectoryBalanceAgent):
    """Trajectory balance with the batch's log Z."""

    Config = VarGradConfig


ENTRIES = {
    "trajectory-balance": AgentEntry(
        TrajectoryBalanceAgent,
        TrajectoryBalanceConfig,
        "trajectory balance with a learned log Z for each prompt",
        "Malkin et al. 2022, arXiv 2201.13259",
        fixed_point=fixed_point,
    ),
    "vargrad": AgentEntry(
        VarGradAgent,
        VarGradConfig,
        "variance of the log-ratio over a batch: trajectory balance with the batch's log Z",
        "Richter et al. 2020, arXiv 2010.10436",
        fixed_point=fixed_point,
    ),
}
