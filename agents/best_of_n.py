r"""Best-of-n and expert iteration: draw n responses to a prompt, imitate the best of them.

    loss = - mean over groups of log pi(y_best|x),    y_best = argmax_i R(x, y_i)

From the reference the limit is its best-of-n law, F(R(y))^n - F(R(y)-)^n shared out by p_ref
with F the distribution of rewards (Beirami et al. 2024, arXiv 2401.01879, Lemma 1): not the
EBM, whatever n and beta. From the policy itself (expert iteration, as in Singh et al. 2023,
arXiv 2312.06585) the step is repeated on its own result, and ends at the best response alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from rl_ebm.agents.learner import (
    Learner,
    check_batch_size,
    check_rates,
    draw_prompts,
    token_values,
)
from rl_ebm.ebm import EBM
from rl_ebm.fixed_points import FixedPoint, Problem, best_of_n, best_response
from rl_ebm.policies.scoring import Policy, Trainable, q_values, sample
from rl_ebm.policies.tabular import Uniform
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch


@dataclass(frozen=True)
class BestOfNConfig:
    """Options of the agent ``best-of-n``."""

    source: Literal["reference", "policy"] = "policy"
    """who draws the n: the reference (uniform without one), or the policy (expert iteration)"""
    n: int = 4
    """responses of a group, of which the best is imitated"""
    batch_size: int = 4096
    """responses in a step; groups of n"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        check_batch_size("batch_size", self.batch_size)
        if not 1 <= self.n <= self.batch_size:
            raise ValueError(f"n must be in [1, batch_size={self.batch_size}], got {self.n}")
        if self.source not in ("reference", "policy"):
            raise ValueError(f"source must be 'reference' or 'policy', got {self.source!r}")


def best_of_groups(reward: Float[Tensor, "B"], n: int) -> Int64[Tensor, "G"]:
    """The row of largest reward in each run of n rows, the first of equals."""
    groups = F.pad(reward, (0, -len(reward) % n), value=-torch.inf).view(-1, n)
    return groups.argmax(1) + n * torch.arange(len(groups), device=reward.device)


def fixed_point(config: BestOfNConfig, problem: Problem) -> FixedPoint:
    """The best-of-n law of p_ref, or the best response alone."""
    if config.source == "policy":
        return FixedPoint(best_response(problem), degenerate=config.n > 1, sampler=True)
    law = best_of_n(problem.log_ref_responses, problem.g_responses, config.n)
    return FixedPoint(law, sampler=True)


class BestOfNAgent:
    """Imitates the best of n."""

    logits_are_values = False

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: BestOfNConfig | None = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        self.config = BestOfNConfig() if config is None else config
        ebm.check_policy(policy)
        self.ebm, self.policy = ebm, policy
        reference: Policy = Uniform(ebm.space) if ebm.reference is None else ebm.reference
        self.source: Policy = policy if self.config.source == "policy" else reference
        self.generator = torch.Generator(ebm.device) if generator is None else generator
        self.learner = Learner(policy, self.config.lr, self.config.max_grad_norm)

    def sample(self) -> Batch | None:
        """Groups of n responses, one after the other."""
        n = self.config.n
        groups = draw_prompts(self.config.batch_size // n, self.ebm.num_prompts, 1, self.generator)
        ids = groups.repeat_interleave(n)
        return sample(self.source, self.ebm.space, len(ids), self.generator, ids)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on the best of every group of n rows."""
        if batch.reward is None:
            raise ValueError("the batch has no rewards: call ebm.score(batch) first")
        rows = best_of_groups(batch.reward, self.config.n)
        batch = batch.clean()
        best = Batch(batch.tokens[rows], batch.lengths[rows], batch.prompt_ids[rows])
        q = q_values(self.policy, self.ebm.space, best.tokens, best.prompt_ids)
        loss = -token_values(log_policy(q), best).sum(1).mean()
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
