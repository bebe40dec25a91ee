r"""Full-gradient distillation over the prefix tree: no sampling, every prefix at each step.

    forward:  KL(p*, pi) = sum_s p*(s) KL(pi*(.|s), pi(.|s))
    reverse:  KL(pi, p*) = sum_s pi(s) KL(pi(.|s), pi*(.|s))

with the gradient through pi(s) as well. The chain rule is arXiv 2512.15605, App. A.4; the
reverse direction is the distillation of its Eq. (2), the forward one teacher forcing with
infinite data. What an agent that samples can at best reach.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm import divergences
from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.base import BaseAgent, given
from rl_ebm.agents.shared.learner import check_rates
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import target
from rl_ebm.messages.words import count_text
from rl_ebm.policies.base import Policy
from rl_ebm.policies.scoring import tree_q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, TokenSpace


@checked_options
class ExactConfig:
    """Options of the agent ``exact``."""

    direction: Literal["forward", "reverse"] = "forward"
    """"forward" minimises KL(target, policy), "reverse" KL(policy, target)"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)


def exact_loss(
    q: Float[Tensor, "P S A"],
    log_pi_star: Float[Tensor, "P S A"],
    space: TokenSpace,
    direction: str = "forward",
) -> Float[Tensor, ""]:
    """The KL between the policy of q and the target, mean over the prompts, nats.

    Args:
        q: masked logits at every state, shallow ones first.
        log_pi_star: the target's log-probabilities there.
        space: the responses.
        direction: "forward" for KL(target, policy), "reverse" for KL(policy, target).
    """
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    log_pi = torch.split(log_policy(q), sizes, dim=1)
    star = torch.split(log_pi_star, sizes, dim=1)
    pair = (star, log_pi) if direction == "forward" else (log_pi, star)
    return divergences.kl_tables(*pair, space).mean()


MAX_LOGITS = 2**28
"""of all prefixes together, at most"""


class ExactAgent(BaseAgent):
    """Descends the exact KL. Its updates take no batch."""

    Config = ExactConfig

    def begin(self, teacher: Policy | None) -> None:
        """The teacher's log-probabilities at every prefix."""
        ebm, teacher = self.ebm, given(teacher, self.ebm, "exact")
        size = ebm.num_prompts * ebm.space.num_states * ebm.space.vocab_size
        if size > MAX_LOGITS:
            raise ValueError(
                f"exact lists the logits of all prefixes, and {count_text(size)} are too many: "
                "make vocab_size or max_length smaller, or use another agent"
            )
        with torch.no_grad():
            star = log_policy(tree_q_values(teacher, ebm.space, ebm.num_prompts))
        if self.config.direction == "reverse" and bool(
            (torch.isneginf(star) & ebm.space.state_action_mask(star.device)).any()
        ):
            raise ValueError(
                "the target forbids some responses, so KL(policy, target) is infinite: use "
                "direction='forward'"
            )
        self.log_pi_star = star.float()

    def sample(self) -> Batch | None:
        """Nothing: no response is drawn."""
        return None

    def update(self, batch: Batch | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on all prefixes."""
        q = tree_q_values(self.policy, self.ebm.space, self.ebm.num_prompts)
        loss = exact_loss(q, self.log_pi_star, self.ebm.space, self.config.direction)
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)


ENTRIES = {
    "exact": AgentEntry(
        ExactAgent,
        ExactConfig,
        "full-gradient distillation of the exact solution over every prefix",
        "Blondel et al. 2025, arXiv 2512.15605, Eq. (2)",
        needs_teacher=True,
        fixed_point=target,
    ),
}
