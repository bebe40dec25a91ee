r"""On-policy distillation: the policy writes, the teacher says at each state what it would do.

    loss = mean_i sum_t D(teacher(.|s_t), pi(.|s_t)),    s_t along responses drawn from pi,

with the full distributions over the next token and no gradient through the draws. Agarwal et al.
2024 (arXiv 2306.13649, Eq. 3); D is the forward KL(teacher, pi), the reverse KL(pi, teacher), or
Jensen-Shannon. Each is 0 at every state that is visited exactly where the policy is the
teacher's: with the exact solution as the teacher, at the EBM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm import divergences
from rl_ebm.agents.learner import Learner, check_batch_size, check_rates, draw_prompts
from rl_ebm.ebm import EBM
from rl_ebm.policies.scoring import Policy, Trainable, q_values, sample
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, length_mask

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": divergences.kl,
    "reverse": lambda teacher, pi: divergences.kl(pi, teacher),
    "js": divergences.js,
}


@dataclass(frozen=True)
class OnPolicyDistillationConfig:
    """Options of the agent ``on-policy-distillation``."""

    divergence: Literal["forward", "reverse", "js"] = "reverse"
    """of the teacher and the policy at each state"""
    batch_size: int = 2048
    """responses in a step"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        check_batch_size("batch_size", self.batch_size)
        if self.divergence not in DIVERGENCES:
            names = ", ".join(DIVERGENCES)
            raise ValueError(f"divergence must be one of {names}, got {self.divergence!r}")


def on_policy_distillation_loss(
    log_pi: Float[Tensor, "B T A"],
    log_teacher: Float[Tensor, "B T A"],
    lengths: Int64[Tensor, "B"],
    divergence: str = "reverse",
) -> Float[Tensor, ""]:
    """Sum of the divergences at the states of each response, mean over the responses; nats."""
    past = ~length_mask(lengths, log_pi.shape[1])
    # Rows past the end say nothing; equal ones, of one action, have divergence and gradient 0.
    log_pi, log_teacher = (x.masked_fill(past[..., None], 0.0) for x in (log_pi, log_teacher))
    terms = DIVERGENCES[divergence](log_teacher, log_pi)
    return terms.masked_fill(past, 0.0).sum(1).mean()


class OnPolicyDistillationAgent:
    """Learns from a teacher at the states that its own policy visits."""

    logits_are_values = False

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: OnPolicyDistillationConfig | None = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        if teacher is None:
            raise ValueError(
                "on-policy-distillation needs a teacher: pass teacher=rl_ebm.solve(ebm)"
            )
        ebm.check_policy(policy)
        ebm.check_policy(teacher, "the teacher")
        self.config = OnPolicyDistillationConfig() if config is None else config
        if self.config.divergence == "reverse" and bool(getattr(teacher, "forbids", False)):
            raise ValueError(
                "the teacher forbids some actions, so KL(policy, teacher) is infinite: use "
                "divergence='forward' or 'js'"
            )
        self.ebm, self.policy, self.teacher = ebm, policy, teacher
        self.generator = torch.Generator(ebm.device) if generator is None else generator
        self.learner = Learner(policy, self.config.lr, self.config.max_grad_norm)

    def sample(self) -> Batch | None:
        """Responses of the policy itself."""
        n, p = self.config.batch_size, self.ebm.num_prompts
        prompt_ids = draw_prompts(n, p, 1, self.generator)
        return sample(self.policy, self.ebm.space, n, self.generator, prompt_ids)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step; the rewards of the batch are not read."""
        batch = batch.clean()
        space, ids = self.ebm.space, batch.prompt_ids
        with torch.no_grad():
            # A single prompt needs no ids: the teacher would read them from the device to check.
            asked = ids if self.ebm.num_prompts > 1 else None
            log_teacher = log_policy(q_values(self.teacher, space, batch.tokens, asked))
        log_pi = log_policy(q_values(self.policy, space, batch.tokens, ids))
        loss = on_policy_distillation_loss(
            log_pi, log_teacher.to(log_pi.dtype), batch.lengths, self.config.divergence
        )
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
