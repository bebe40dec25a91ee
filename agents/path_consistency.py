r"""Path consistency: the soft Bellman equation, squared, over sub-trajectories.

With q the logits, V = logsumexp q, log pi = q - V and V(end) = 0, every sub-trajectory has

    C_ij = V(s_i) - V(s_j) - sum_{i <= t < j} (r_t - log pi(a_t|s_t)) = H_i - H_j,
    H_i = V(s_i) + sum_{t < i} (r_t - log pi(a_t|s_t)),

which is 0 for all of them exactly at q = q*, whoever drew the response.

    loss = sum_{i < j} lam^(j-i) C_ij^2 / 2  /  sum_{i < j} lam^(j-i),   j - i <= longest,

with the gradient through both ends (not a semi-gradient). Nachum et al. 2017 (arXiv 1702.08892,
Eq. 15) sum over lengths up to d with lam = 1; sub-trajectory balance (Madan et al. 2023,
arXiv 2209.12782, Eq. 8) has these weights, with the flow log F(s) = V(s); detailed balance
(Bengio et al. 2023, arXiv 2111.09266) is longest = 1: the residual q - r - V(next) itself.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.learner import token_values
from rl_ebm.agents.shared.off_policy import OffPolicyOptions, fixed_point
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.agents.shared.values import ValueAgent, carried_q
from rl_ebm.soft_bellman import log_policy, soft_value
from rl_ebm.tokens import Batch, length_mask


@checked_options
class PathConsistencyConfig(OffPolicyOptions):
    """Options of the agents ``path-consistency``, ``subtb`` and ``detailed-balance``."""

    lam: float | int = 1.0
    """weight of a sub-trajectory by its length k: lam^k"""
    longest: int | None = None
    """tokens of the longest sub-trajectory; None for whole responses"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm: the loss is a mean over sub-trajectories, no sum"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lam < float("inf"):
            raise ValueError(f"lam must be a finite number > 0, got {self.lam}")
        if self.longest is not None and self.longest < 1:
            raise ValueError(f"longest must be >= 1, or None for no limit, got {self.longest}")

    values_apart: ClassVar[bool] = True


@checked_options
class SubTBConfig(PathConsistencyConfig):
    """Options of the agent ``subtb``."""

    lam: float | int = 0.9
    """weight of a sub-trajectory by its length k: lam^k"""


@checked_options
class DetailedBalanceConfig(PathConsistencyConfig):
    """Options of the agent ``detailed-balance``."""

    longest: int | None = 1
    """tokens of the longest sub-trajectory; None for whole responses"""


def path_consistency_loss(
    v: Float[Tensor, "B T"],
    log_pi: Float[Tensor, "B T"],
    r: Float[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    lam: float | int = 1.0,
    longest: int | None = None,
) -> Float[Tensor, ""]:
    """The loss of the module's docstring, mean over the rows.

    Args:
        v: V(s_t) before each token, with gradient.
        log_pi: log pi(a_t|s_t) of the tokens, with gradient.
        r: immediate log-weights of the tokens.
    """
    steps = v.shape[1]
    past = ~length_mask(lengths, steps)
    v, soft = (x.masked_fill(past, 0.0) for x in (v, r - log_pi))
    # H at 0..T; past the end of a response it stays as it is at its end.
    h = torch.nn.functional.pad(v, (0, 1)) + torch.nn.functional.pad(soft.cumsum(1), (1, 0))
    place = torch.arange(steps + 1, device=v.device)
    k = place - place[:, None]  # j - i
    weight = torch.where(k > 0, float(lam) ** k.clamp(min=0).to(v.dtype), 0.0)
    if longest is not None:
        weight = weight.masked_fill(k > min(longest, steps), 0.0)
    real = (place <= lengths[:, None]).to(v.dtype)
    weight = weight * real[:, None, :]  # j is at most the end, and i before it
    squares = (h[:, :, None] - h[:, None, :]).square()
    return 0.5 * ((weight * squares).sum((1, 2)) / weight.sum((1, 2))).mean()


class PathConsistencyAgent(ValueAgent):
    """Path consistency; its policy's raw logits become q*, its V at the root log Z."""

    Config = PathConsistencyConfig

    def loss(self, batch: Batch, r: Float[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of responses, and V at the root."""
        learned = self.learn_values(batch, r)
        q = learned.q if learned.root is None else carried_q(learned, batch, r)
        v, log_pi = soft_value(q), token_values(log_policy(q), batch)
        cfg = self.config
        loss = path_consistency_loss(v, log_pi, r, batch.lengths, cfg.lam, cfg.longest)
        return loss + learned.loss, {"losses/root_value": v[:, 0].detach().mean()}


class SubTBAgent(PathConsistencyAgent):
    """Sub-trajectory balance."""

    Config = SubTBConfig


class DetailedBalanceAgent(PathConsistencyAgent):
    """Detailed balance."""

    Config = DetailedBalanceConfig


ENTRIES = {
    "path-consistency": AgentEntry(
        PathConsistencyAgent,
        PathConsistencyConfig,
        "path consistency (PCL): squared soft Bellman residuals of all sub-trajectories",
        "Nachum et al. 2017, arXiv 1702.08892",
        fixed_point=fixed_point,
    ),
    "subtb": AgentEntry(
        SubTBAgent,
        SubTBConfig,
        "sub-trajectory balance, weights lambda^length, with V = logsumexp q as the flow",
        "Madan et al. 2023, arXiv 2209.12782",
        fixed_point=fixed_point,
    ),
    "detailed-balance": AgentEntry(
        DetailedBalanceAgent,
        DetailedBalanceConfig,
        "detailed balance with V = logsumexp q: the squared one-step soft Bellman residual",
        "Bengio et al. 2023, arXiv 2111.09266",
        fixed_point=fixed_point,
    ),
}
