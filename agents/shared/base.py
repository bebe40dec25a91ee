"""What every agent is made of: its options, its policy, a generator, a learner, and its state."""

from __future__ import annotations

from typing import Any

import torch

from rl_ebm.agents.shared.learner import Learner, check_finite_weights
from rl_ebm.agents.shared.trained import check_given, check_trained
from rl_ebm.ebm import EBM
from rl_ebm.policies.base import Policy, Trainable


class BaseAgent:
    """The one constructor of the agents, and what a checkpoint has of each.

    An agent is made in the same order whatever it is: its options are checked, and where they have
    a stand-in for ``-inf`` that it is there; the policy is checked; then come the generator, what
    :meth:`begin` makes, and the learner. Of more than the learner's state a checkpoint has what
    :attr:`kept` names; more than tensors an agent adds to the two methods itself.

    Args:
        ebm: what is distilled.
        policy: trained in place.
        config: options, of :attr:`Config`; None for the defaults.
        generator: of everything that is drawn; None for a new one.
        teacher: the exact solution, for agents that need one.
    """

    logits_are_values = False
    Config: type[Any]
    kept: tuple[str, ...] = ()
    """attributes that are tensors, and belong to the state"""

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: Any = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        self.config = check_given(ebm, self.Config, config, generator, teacher)
        if hasattr(self.config, "forbidden_log_weight"):
            check_finite_weights(ebm, self.config.forbidden_log_weight, teacher)
        check_trained(ebm, policy, teacher)
        self.ebm, self.policy = ebm, policy
        self.generator = torch.Generator(ebm.device) if generator is None else generator
        self.begin(teacher)
        self.extra = self.extra_parameters()
        self.learner = Learner(policy, self.config.lr, self.config.max_grad_norm, self.extra)

    def begin(self, teacher: Policy | None) -> None:
        """Make what else the agent is made of, before its learner."""

    def extra_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """What is learned beside the policy."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {"learner": self.learner.state_dict()} | {
            name: getattr(self, name).clone() for name in self.kept
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        for name in self.kept:
            setattr(self, name, state[name].to(self.ebm.device))


def given(teacher: Policy | None, ebm: EBM, name: str) -> Policy:
    """The teacher of the agent ``name``; ValueError where there is none, or for another space."""
    if teacher is None:
        raise ValueError(f"{name} needs a teacher: pass teacher=rl_ebm.solve(ebm)")
    ebm.check_policy(teacher, "the teacher")
    return teacher
