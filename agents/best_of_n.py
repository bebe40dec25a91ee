r"""Best-of-n and expert iteration: draw n responses to a prompt, imitate the best of them.

    loss = - mean over groups of log pi(y_best|x),    y_best = argmax_i R(x, y_i)

From the reference the limit is its best-of-n law, F(R(y))^n - F(R(y)-)^n shared out by p_ref
with F the distribution of rewards (Beirami et al. 2024, arXiv 2401.01879, Lemma 1): not the
EBM, whatever n and beta. From the policy itself (expert iteration, as in Singh et al. 2023,
arXiv 2312.06585) the step is repeated on its own result, and ends at the best response alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.imitation import ImitationAgent, ImitationOptions
from rl_ebm.agents.shared.learner import draw_prompts
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import FixedPoint, Problem, best_of_n, best_response
from rl_ebm.tokens import Batch


@checked_options
class BestOfNConfig(ImitationOptions):
    """Options of the agent ``best-of-n``."""

    source: Literal["reference", "policy"] = "policy"
    """who draws the n: the reference (uniform without one), or the policy (expert iteration)"""
    n: int = 4
    """responses of a group, of which the best is imitated; batch_size counts responses"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n <= self.batch_size:
            raise ValueError(f"n must be in [1, batch_size={self.batch_size}], got {self.n}")


def best_of_groups(reward: Float[Tensor, "B"], n: int) -> Int64[Tensor, "G"]:
    """The row of largest reward in each run of n rows, the first of equals."""
    groups = F.pad(reward, (0, -len(reward) % n), value=-torch.inf).view(-1, n)
    return groups.argmax(1) + n * torch.arange(len(groups), device=reward.device)


def fixed_point(config: BestOfNConfig, problem: Problem) -> FixedPoint:
    """The best-of-n law of p_ref, or the best response alone."""
    if config.n == 1:  # nothing is chosen
        return FixedPoint(problem.start_law, sampler=True)
    if config.source == "policy":
        return best_response(problem)
    return FixedPoint(best_of_n(problem.start_law, problem.g_responses, config.n), sampler=True)


class BestOfNAgent(ImitationAgent):
    """Imitates the best of n."""

    Config = BestOfNConfig

    def prompts(self) -> Int64[Tensor, "B"]:
        """Groups of n rows with the same prompt, one after the other."""
        n = self.config.n
        groups = draw_prompts(self.config.batch_size // n, self.ebm.num_prompts, 1, self.generator)
        return groups.repeat_interleave(n)

    def chosen(self, batch: Batch) -> Batch:
        """The best of every group of n rows."""
        rows = best_of_groups(batch.rewards(), self.config.n)
        return batch.take(rows)

    def counts(self, batch: Batch) -> Bool[Tensor, "B"] | None:
        """A group that has impossible responses alone has no best one."""
        return ~torch.isneginf(batch.rewards())


ENTRIES = {
    "best-of-n": AgentEntry(
        BestOfNAgent,
        BestOfNConfig,
        "imitation of the best of n responses: of the policy (expert iteration) or the reference",
        "Beirami et al. 2024, arXiv 2401.01879",
        fixed_point=fixed_point,
        variants=({"source": "policy"}, {"source": "reference"}),
    ),
}
