r"""Distribution matching: DPG, GDC and f-DPG, an f-divergence to the EBM by policy gradient.

With u = log pi(y|x) - log p*(y|x) and D_f(pi, p*) = E_{p*} f(exp u),

    grad D_f = E_pi [f'(exp u) grad log pi(y|x)],

    forward-kl   f' = -exp(-u)            KL(p*, pi): DPG (Parshakova et al. 2019, arXiv 1912.08517)
    reverse-kl   f' = u + 1               KL(pi, p*): the policy gradient with k1 in the reward
    js           f' = log(2 t / (t + 1)),  t = exp u
    tv           f' = sign(u) / 2
    chi2         f' = 2 (exp u - 1)       chi^2(pi, p*)

(Go et al. 2023, arXiv 2302.08215, Eq. 4 and Table 1; Khalifa et al. 2021, arXiv 2012.11635, for
the moving average of Z; Korbak et al. 2022, arXiv 2206.00761, for the baseline.) p* needs Z:
a moving average over batches of the mean of exp(log-weight - log pi), which has no bias. Each
divergence is 0 at the EBM alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.kl_penalty import centred
from rl_ebm.agents.shared.learner import group_ids, log_mean_exp
from rl_ebm.agents.shared.on_policy import OnPolicyAgent, OnPolicyOptions, trained_on
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import FixedPoint, Problem, target
from rl_ebm.policies.base import Policy
from rl_ebm.tokens import Batch

LARGEST = 30.0
"""of |u| in an exponent: a batch with a larger one would throw its step away"""
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda u: -torch.exp((-u).clamp(max=LARGEST)),
    "reverse-kl": lambda u: u + 1,
    "js": lambda u: math.log(2) - F.softplus(-u),
    "tv": lambda u: torch.sign(u) / 2,
    "chi2": lambda u: 2 * torch.expm1(u.clamp(max=LARGEST)),
}
"""f'(exp u) of each divergence"""


@checked_options
class MatchingConfig(OnPolicyOptions):
    """Options of the agent ``dpg``."""

    divergence: Literal["forward-kl", "reverse-kl", "js", "tv", "chi2"] = "forward-kl"
    """f-divergence that is descended"""
    z_decay: float | int = 0.9
    """share of the moving average of Z that a new batch leaves as it is"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.z_decay < 1:
            raise ValueError(f"z_decay must be in [0, 1), got {self.z_decay}")


def matching_loss(
    log_pi: Float[Tensor, "B"],
    log_weight: Float[Tensor, "B"],
    log_z: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int = 1,
    divergence: str = "forward-kl",
    group_size: int | None = None,
) -> Float[Tensor, ""]:
    """The surrogate whose gradient is that of D_f(pi, p*), with a leave-one-out baseline.

    Args:
        log_pi: log pi(y|x) of responses drawn from pi, with gradient.
        log_weight: log p_ref(y|x) + R / beta.
        log_z: of each response's prompt.
        group_size: of the groups that a baseline is of; None for all responses to a prompt.
    """
    slope = SLOPES[divergence](log_pi.detach() - log_weight + log_z)
    ids, count = group_ids(prompt_ids, num_prompts, group_size)
    return (centred(slope, ids, count) * log_pi).mean()


def fixed_point(config: MatchingConfig, problem: Problem) -> FixedPoint:
    """The EBM, of every divergence; with the stand-in where p_ref forbids an action."""
    return target(config, trained_on(config.forbidden_log_weight, problem))


class MatchingAgent(OnPolicyAgent):
    """Distribution matching on the policy's own samples."""

    Config = MatchingConfig
    kept = ("log_z",)

    def begin(self, teacher: Policy | None) -> None:
        """The average, of nothing yet."""
        super().begin(teacher)
        # log of the moving average of Z, and of its weight so far: nothing was seen yet.
        self.log_z = torch.full((2, self.ebm.num_prompts), -torch.inf, device=self.ebm.device)

    def loss(
        self,
        batch: Batch,
        log_pi: Float[Tensor, "B T"],
        log_pi_old: Float[Tensor, "B T"],
        log_ref: Float[Tensor, "B T"],
        gain: Float[Tensor, "B"],
    ) -> Tensor:
        """The surrogate of the policy's responses."""
        ids, p = batch.prompt_ids, self.ebm.num_prompts
        log_pi_y, log_weight = log_pi.sum(1), gain + log_ref.sum(1)
        self._average(log_weight - log_pi_y.detach(), ids)
        log_z = (self.log_z[0] - self.log_z[1])[ids]
        cfg = self.config
        return matching_loss(log_pi_y, log_weight, log_z, ids, p, cfg.divergence, cfg.group_size)

    def _average(self, log_ratio: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"]) -> None:
        """Take the batch's mean of exp(log-ratio), prompt by prompt, into that of Z."""
        keep = self.config.z_decay
        log_keep = math.log(keep) if keep else -math.inf
        log_mean = log_mean_exp(log_ratio, prompt_ids, self.ebm.num_prompts)
        new = torch.stack([log_mean, torch.zeros_like(log_mean)])
        mixed = torch.logaddexp(self.log_z + log_keep, new + math.log(1 - keep))
        self.log_z = torch.where(log_mean > -math.inf, mixed, self.log_z)

    def learned_log_z(self) -> Float[Tensor, "P"] | None:
        """log of the moving average of Z; -inf for a prompt that was not seen yet."""
        total, weight = self.log_z
        return torch.where(weight > -torch.inf, total - weight, -torch.inf)


ENTRIES = {
    "dpg": AgentEntry(
        MatchingAgent,
        MatchingConfig,
        "distribution matching (DPG, GDC, f-DPG): an f-divergence by policy gradient",
        "Go et al. 2023, arXiv 2302.08215",
        fixed_point=fixed_point,
        variants=tuple({"divergence": name} for name in SLOPES),
    ),
}
