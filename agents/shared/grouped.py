"""Off-policy agents that compare the responses to a prompt with each other."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Int64
from torch import Tensor

from rl_ebm.agents.shared.learner import draw_groups
from rl_ebm.agents.shared.off_policy import OffPolicyAgent
from rl_ebm.tokens import Batch

GROUP = 4
"""responses to a prompt in a step, at least, where no size of a group is given"""


class GroupedAgent(OffPolicyAgent):
    """Draws and replays groups that share a prompt, while :attr:`compares`."""

    @property
    @abstractmethod
    def group_size(self) -> int | None:
        """Responses that are compared; None for all to a prompt in the step, at least 4."""

    @property
    def compares(self) -> bool:
        """Whether responses are compared at all."""
        return True

    @property
    def fewest(self) -> int:
        """Two, or a whole group."""
        return (self.group_size or 2) if self.compares else 1

    @property
    def responses(self) -> int:
        """Whole groups alone, where their size is given."""
        n, size = self.batch_size.now, self.group_size
        return n if size is None or not self.compares else n - n % size

    def prompts(self) -> Int64[Tensor, "B"]:
        """Groups that share a prompt."""
        if not self.compares:
            return super().prompts()
        n, count = self.batch_size.now, self.ebm.num_prompts
        return draw_groups(n, count, self.group_size, GROUP, self.generator)

    def replayed(self) -> Batch:
        """Responses of earlier steps: runs to the same prompt."""
        cfg = self.config
        if not self.compares or self.ebm.num_prompts == 1:
            return super().replayed()
        run = min(self.group_size or GROUP, cfg.replay_batch, len(self.replay))
        return self.replay.sample(cfg.replay_batch, self.generator, run)
