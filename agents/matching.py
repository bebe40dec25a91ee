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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from rl_ebm.agents.kl_penalty import centred
from rl_ebm.agents.learner import log_mean_exp
from rl_ebm.agents.on_policy import OnPolicyAgent, OnPolicyOptions
from rl_ebm.ebm import EBM
from rl_ebm.policies.scoring import Policy, Trainable
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


@dataclass(frozen=True)
class MatchingConfig(OnPolicyOptions):
    """Options of the agent ``dpg``."""

    divergence: Literal["forward-kl", "reverse-kl", "js", "tv", "chi2"] = "forward-kl"
    """f-divergence that is descended"""
    z_decay: float | int = 0.9
    """share of the moving average of Z that a new batch leaves as it is"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in SLOPES:
            names = ", ".join(SLOPES)
            raise ValueError(f"divergence must be one of {names}, got {self.divergence!r}")
        if not 0 <= self.z_decay < 1:
            raise ValueError(f"z_decay must be in [0, 1), got {self.z_decay}")


def matching_loss(
    log_pi: Float[Tensor, "B"],
    log_weight: Float[Tensor, "B"],
    log_z: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int = 1,
    divergence: str = "forward-kl",
) -> Float[Tensor, ""]:
    """The surrogate whose gradient is that of D_f(pi, p*), with a leave-one-out baseline.

    Args:
        log_pi: log pi(y|x) of responses drawn from pi, with gradient.
        log_weight: log p_ref(y|x) + R / beta.
        log_z: of each response's prompt.
    """
    slope = SLOPES[divergence](log_pi.detach() - log_weight + log_z)
    return (centred(slope, prompt_ids, num_prompts) * log_pi).mean()


class MatchingAgent(OnPolicyAgent):
    """Distribution matching on the policy's own samples."""

    Config = MatchingConfig

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: MatchingConfig | None = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        super().__init__(ebm, policy, config, generator, teacher)
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
        return matching_loss(log_pi_y, log_weight, log_z, ids, p, self.config.divergence)

    def _average(self, log_ratio: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"]) -> None:
        """Take the batch's mean of exp(log-ratio), prompt by prompt, into that of Z."""
        keep = self.config.z_decay
        log_keep = math.log(keep) if keep else -math.inf
        log_mean = log_mean_exp(log_ratio, prompt_ids, self.ebm.num_prompts)
        new = torch.stack([log_mean, torch.zeros_like(log_mean)])
        mixed = torch.logaddexp(self.log_z + log_keep, new + math.log(1 - keep))
        self.log_z = torch.where(log_mean > -math.inf, mixed, self.log_z)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"log_z": self.log_z.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.log_z = state["log_z"].to(self.ebm.device)
