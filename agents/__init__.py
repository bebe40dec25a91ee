"""Agents: one file for each objective, its loss callable from outside.

An agent has a ``policy``, ``sample() -> Batch | None`` (the responses that it wants next),
``update(batch, progress) -> metrics`` (one gradient step on scored responses) and
``state_dict`` / ``load_state_dict``. It touches no environment, file, clock or writer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from rl_ebm.agents.exact import ExactAgent, ExactConfig
from rl_ebm.agents.policy_gradient import PolicyGradientAgent, PolicyGradientConfig
from rl_ebm.agents.soft_q import SoftQAgent, SoftQConfig
from rl_ebm.agents.teacher_forcing import TeacherForcingAgent, TeacherForcingConfig
from rl_ebm.policies import Trainable
from rl_ebm.tokens import Batch


@runtime_checkable
class Agent(Protocol):
    """What the training loop needs of an agent."""

    policy: Trainable
    logits_are_values: bool
    learner: Any

    def sample(self) -> Batch | None: ...

    def update(self, batch: Any, progress: float = 0.0) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AgentEntry(NamedTuple):
    """An agent by name: its class, its options, what it does, where it is from."""

    agent: Any
    config: Any
    summary: str
    paper: str
    needs_teacher: bool = False
    needs_reward: bool = True


AGENTS = {
    "soft-q": AgentEntry(
        SoftQAgent,
        SoftQConfig,
        "soft Q-learning on sequences: logits regress on soft lambda- or n-step returns",
        "Haarnoja et al. 2017, arXiv 1702.08165",
    ),
    "policy-gradient": AgentEntry(
        PolicyGradientAgent,
        PolicyGradientConfig,
        "KL-regularised REINFORCE, leave-one-out baseline (RLOO), k1 KL in the reward",
        "Ahmadian et al. 2024, arXiv 2402.14740",
    ),
    "teacher-forcing": AgentEntry(
        TeacherForcingAgent,
        TeacherForcingConfig,
        "negative log-likelihood of samples of a teacher, by default the exact solution",
        "Blondel et al. 2025, arXiv 2512.15605, Prop. 2",
        needs_teacher=True,
        needs_reward=False,
    ),
    "exact": AgentEntry(
        ExactAgent,
        ExactConfig,
        "full-gradient distillation of the exact solution over every prefix",
        "Blondel et al. 2025, arXiv 2512.15605, Eq. (2)",
        needs_teacher=True,
        needs_reward=False,
    ),
}

__all__ = [
    "AGENTS",
    "Agent",
    "AgentEntry",
    "ExactAgent",
    "ExactConfig",
    "PolicyGradientAgent",
    "PolicyGradientConfig",
    "SoftQAgent",
    "SoftQConfig",
    "TeacherForcingAgent",
    "TeacherForcingConfig",
]
