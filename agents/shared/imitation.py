"""What agents share that imitate responses: the negative log-likelihood of chosen ones."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.agents.shared.account import Behaviour
from rl_ebm.agents.shared.base import BaseAgent
from rl_ebm.agents.shared.learner import check_batch_size, check_rates, draw_prompts
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.policies.base import Policy
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.scoring import q_values
from rl_ebm.policies.tabular import Uniform
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch


@checked_options
class ImitationOptions:
    """Options of every agent that imitates responses."""

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
    q: Float[Tensor, "B T A"],
    tokens: Int64[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    counts: Bool[Tensor, "B"] | None = None,
) -> Float[Tensor, ""]:
    """-log pi(y|x), summed over the real tokens, mean over the rows; nats.

    Args:
        q: masked logits before each token.
        tokens: the responses to imitate.
        lengths: real tokens of each.
        counts: rows that count; None for all. 0 where none does.
    """
    log_pi = sequence_log_prob(log_policy(q), tokens, lengths)
    if counts is None:
        return -log_pi.mean()
    return -log_pi.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


class ImitationAgent(BaseAgent):
    """Draws responses of its source and imitates those that :meth:`chosen` makes of them."""

    Config = ImitationOptions

    def begin(self, teacher: Policy | None) -> None:
        """Its source."""
        self.source = self.drawn_from(teacher)

    def drawn_from(self, teacher: Policy | None) -> Policy:
        """Who draws: here the policy itself, or the reference (uniform without one)."""
        if self.config.source == "policy":
            return self.policy
        return Uniform(self.ebm.space) if self.ebm.reference is None else self.ebm.reference

    @property
    def own_rows(self) -> slice | None:
        """The rows of :meth:`sample` that are draws of the policy as it is; None without one."""
        return slice(None) if self.source is self.policy else None

    def prompts(self) -> Int64[Tensor, "B"]:
        """The prompts of the next responses."""
        return draw_prompts(self.config.batch_size, self.ebm.num_prompts, 1, self.generator)

    def sample(self) -> Batch | None:
        """Responses of the source."""
        ids = self.prompts()
        return sample(self.source, self.ebm.space, len(ids), self.generator, ids)

    def chosen(self, batch: Batch) -> Batch:
        """The responses to imitate, made of those that were drawn; here all of them."""
        return batch

    def counts(self, batch: Batch) -> Bool[Tensor, "B"] | None:
        """Which of those are imitated; None for all, whatever they pay."""
        return None

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The loss of responses of the source."""
        with torch.no_grad():
            batch = self.chosen(batch)
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        return teacher_forcing_loss(q, batch.tokens, batch.lengths, self.counts(batch))

    def behaviour(self) -> Behaviour | None:
        """The policy or the reference draws."""
        return Behaviour() if self.source is self.policy else Behaviour(0.0, reference=1.0)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on responses of the source."""
        loss = self.loss(batch.clean())
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)
