r"""Teacher forcing: the negative log-likelihood of a teacher's samples.

    L = -E_{y ~ teacher} log pi(y|x) = KL(teacher, pi) + H(teacher)

arXiv 2512.15605, Eq. (9) and Prop. 2: its minimiser over all logits is the teacher's policy,
p* for the exact solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.learner import Learner, check_batch_size, check_rates, draw_prompts
from rl_ebm.ebm import EBM
from rl_ebm.policies.scoring import Policy, Trainable, q_values, sample
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch


@dataclass(frozen=True)
class TeacherForcingConfig:
    """Options of the agent ``teacher-forcing``."""

    batch_size: int = 4096
    """responses in a step, at least 1"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        check_batch_size("batch_size", self.batch_size)


def teacher_forcing_loss(
    q: Float[Tensor, "B T A"], tokens: Int64[Tensor, "B T"], lengths: Int64[Tensor, "B"]
) -> Float[Tensor, ""]:
    """-log pi(y|x), summed over the real tokens, mean over the rows; nats.

    Args:
        q: masked logits before each token.
        tokens: the teacher's responses.
        lengths: real tokens of each.
    """
    return -sequence_log_prob(log_policy(q), tokens, lengths).mean()


class TeacherForcingAgent:
    """Fits the samples of a teacher, any policy."""

    logits_are_values = False

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: TeacherForcingConfig | None = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        if teacher is None:
            raise ValueError("teacher-forcing needs a teacher: pass teacher=rl_ebm.solve(ebm)")
        ebm.check_policy(policy)
        ebm.check_policy(teacher, "the teacher")
        self.config = TeacherForcingConfig() if config is None else config
        self.ebm, self.policy, self.teacher = ebm, policy, teacher
        self.generator = torch.Generator(ebm.device) if generator is None else generator
        self.learner = Learner(policy, self.config.lr, self.config.max_grad_norm)

    def sample(self) -> Batch | None:
        """Responses of the teacher."""
        n, p = self.config.batch_size, self.ebm.num_prompts
        prompt_ids = draw_prompts(n, p, 1, self.generator)
        return sample(self.teacher, self.ebm.space, n, self.generator, prompt_ids)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step; the rewards of the batch are not read."""
        batch = batch.clean()
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        loss = teacher_forcing_loss(q, batch.tokens, batch.lengths)
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
