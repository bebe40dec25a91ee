r"""On-policy distillation: the policy writes, the teacher says at each state what it would do.

    loss = mean_i sum_t D(teacher(.|s_t), pi(.|s_t)),    s_t along responses drawn from pi,

or, a share of them, from the teacher: there the forward KL is teacher forcing with the exact
probability of every token in the place of the one that was drawn. The distributions over the next
token are full, and no gradient goes through the draws. Agarwal et al. 2024 (arXiv 2306.13649,
Eq. 3 and Alg. 1); D is the forward KL(teacher, pi), the reverse KL(pi, teacher), or
Jensen-Shannon. Each is 0 at every state that is visited exactly where the policy is the
teacher's: with the exact solution as the teacher, at the EBM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm import divergences
from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.account import Behaviour
from rl_ebm.agents.shared.base import given
from rl_ebm.agents.shared.imitation import ImitationAgent, ImitationOptions
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import target
from rl_ebm.policies.base import Policy, forbids_of
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, length_mask

DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": divergences.kl,
    "reverse": lambda teacher, pi: divergences.kl(pi, teacher),
    "js": divergences.js,
}


@checked_options
class OnPolicyDistillationConfig(ImitationOptions):
    """Options of the agent ``on-policy-distillation``."""

    batch_size: int = 2048
    """responses in a step"""
    divergence: Literal["forward", "reverse", "js"] = "reverse"
    """of the teacher and the policy at each state"""
    on_policy: float | int = 1.0
    """share of the responses drawn from the policy, the rest from the teacher"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must be in [0, 1], got {self.on_policy}")


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


class OnPolicyDistillationAgent(ImitationAgent):
    """Learns from a teacher at the states that its own policy visits; rewards are not read."""

    Config = OnPolicyDistillationConfig

    def drawn_from(self, teacher: Policy | None) -> Policy:
        """The policy itself; the teacher only says what it would do."""
        self.teacher = given(teacher, self.ebm, "on-policy-distillation")
        if self.config.divergence == "reverse" and forbids_of(teacher):
            raise ValueError(
                "the teacher forbids some actions, so KL(policy, teacher) is infinite: use "
                "divergence='forward' or 'js'"
            )
        return self.policy

    @property
    def own_rows(self) -> slice | None:
        """The policy's own draws, which come first; None without one."""
        count = round(self.config.on_policy * self.config.batch_size)
        return slice(0, count) if count else None

    def sample(self) -> Batch:
        """Responses of the policy, and of the teacher."""
        ids = self.prompts()
        count = round(self.config.on_policy * len(ids))
        if 0 < count < len(ids):
            # Which rows are whose does not depend on their prompts.
            ids = ids[torch.randperm(len(ids), generator=self.generator, device=ids.device)]
        parts = [
            sample(source, self.ebm.space, len(some), self.generator, some)
            for source, some in ((self.policy, ids[:count]), (self.teacher, ids[count:]))
            if len(some)
        ]
        return parts[0] if len(parts) == 1 else Batch.cat(parts)

    def behaviour(self) -> Behaviour | None:
        """The policy and the teacher draw."""
        return Behaviour(self.config.on_policy, teacher=1 - self.config.on_policy)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The divergences at the states of the policy's responses."""
        space, ids = self.ebm.space, batch.prompt_ids
        with torch.no_grad():
            # A single prompt needs no ids: the teacher would read them from the device to check.
            asked = ids if self.ebm.num_prompts > 1 else None
            log_teacher = log_policy(q_values(self.teacher, space, batch.tokens, asked))
        log_pi = log_policy(q_values(self.policy, space, batch.tokens, ids))
        return on_policy_distillation_loss(
            log_pi, log_teacher.to(log_pi.dtype), batch.lengths, self.config.divergence
        )


ENTRIES = {
    "on-policy-distillation": AgentEntry(
        OnPolicyDistillationAgent,
        OnPolicyDistillationConfig,
        "a teacher's next-token distribution at the states of the policy's own responses",
        "Agarwal et al. 2024, arXiv 2306.13649",
        needs_teacher=True,
        fixed_point=target,
        variants=tuple({"divergence": name} for name in ("forward", "reverse", "js")),
    ),
}
