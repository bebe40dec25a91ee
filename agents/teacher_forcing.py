r"""Teacher forcing: the negative log-likelihood of a teacher's samples.

    L = -E_{y ~ teacher} log pi(y|x) = KL(teacher, pi) + H(teacher)

arXiv 2512.15605, Eq. (9) and Prop. 2: its minimiser over all logits is the teacher's policy,
p* for the exact solution.
"""

from __future__ import annotations

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.account import Behaviour
from rl_ebm.agents.shared.base import given
from rl_ebm.agents.shared.imitation import ImitationAgent, ImitationOptions
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import target
from rl_ebm.policies.base import Policy


@checked_options
class TeacherForcingConfig(ImitationOptions):
    """Options of the agent ``teacher-forcing``."""


class TeacherForcingAgent(ImitationAgent):
    """Fits the samples of a teacher, any policy; their rewards are not read."""

    Config = TeacherForcingConfig

    def drawn_from(self, teacher: Policy | None) -> Policy:
        """The teacher."""
        return given(teacher, self.ebm, "teacher-forcing")

    def behaviour(self) -> Behaviour | None:
        """The teacher draws."""
        return Behaviour(0.0, teacher=1.0)


ENTRIES = {
    "teacher-forcing": AgentEntry(
        TeacherForcingAgent,
        TeacherForcingConfig,
        "negative log-likelihood of samples of a teacher, by default the exact solution",
        "Blondel et al. 2025, arXiv 2512.15605, Prop. 2",
        needs_teacher=True,
        fixed_point=target,
    ),
}
