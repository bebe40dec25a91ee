"""What agents share that learn from their policy's own responses: groups of them, and the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rl_ebm.agents.shared.account import Behaviour
from rl_ebm.agents.shared.base import BaseAgent
from rl_ebm.agents.shared.batch_size import BatchSize, most_responses
from rl_ebm.agents.shared.learner import (
    check_batch_size,
    check_group_size,
    check_rates,
    draw_groups,
    log_ref_and_gain,
    token_values,
)
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import Problem, forbids, law_of, stand_ins
from rl_ebm.policies.base import Policy
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch

GROUP = 8
"""responses to a prompt in a step, at least, where no size of the groups is given"""


@checked_options
class OnPolicyOptions:
    """Options of every agent that learns from its policy's own responses."""

    batch_size: int | None = None
    """responses in a step; None for as many as the noise of the gradient asks for: 64 (a whole
    group, where that is more), and twice as many whenever it dominates, up to 2048
    (fewer where that is many states to evaluate)"""
    group_size: int | None = None
    """responses that are compared with each other, to one prompt: a step has as many whole groups
    as fit. None, the best baseline: all responses to a prompt in the step, at least 8"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""
    forbidden_log_weight: float | int | None = None
    """log-weight trained on in the place of -inf, nats"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        check_group_size(self.group_size, self.batch_size)
        check_batch_size("batch_size", 2 if self.batch_size is None else self.batch_size)


def trained_on(forbidden_log_weight: float | int | None, problem: Problem) -> Problem:
    """The problem that the agents descend: with the stand-in where p_ref forbids an action."""
    if forbidden_log_weight is None or not forbids(problem):
        return problem
    log_ref = stand_ins(problem.log_ref, problem.space, forbidden_log_weight)
    r = [a + b for a, b in zip(log_ref, problem.g, strict=True)]
    law = law_of(r, problem.space)
    return replace(problem, log_ref=log_ref, log_target=law, limits={})


class OnPolicyAgent(BaseAgent, ABC):
    """Sampling and the step of such an agent; a subclass is its :meth:`loss`."""

    Config = OnPolicyOptions
    own_rows = slice(None)
    """the rows of :meth:`sample` that are draws of the policy as it is: all"""

    def begin(self, teacher: Policy | None) -> None:
        """How many responses it draws."""
        fewest, most = self.config.group_size or 2, most_responses(self.ebm)
        self.batch_size = BatchSize(self.config.batch_size, fewest, most)

    @property
    def epochs(self) -> int:
        """Gradient steps on each batch."""
        return 1

    @abstractmethod
    def loss(
        self,
        batch: Batch,
        log_pi: Float[Tensor, "B T"],
        log_pi_old: Float[Tensor, "B T"],
        log_ref: Float[Tensor, "B T"],
        gain: Float[Tensor, "B"],
    ) -> Tensor:
        """The loss of the policy's responses.

        Args:
            log_pi: of the tokens, with gradient, 0 past the end.
            log_pi_old: the same when they were drawn, before the first step on them.
            log_ref: log p_ref of the tokens, 0 past the end.
            gain: R / beta.
        """

    def sample(self) -> Batch | None:
        """Responses of the policy itself, in groups that share a prompt."""
        cfg = self.config
        p = self.ebm.num_prompts
        ids = draw_groups(self.batch_size.now, p, cfg.group_size, GROUP, self.generator)
        return sample(self.policy, self.ebm.space, len(ids), self.generator, ids)

    def behaviour(self) -> Behaviour | None:
        """The policy draws."""
        return Behaviour()

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """``epochs`` gradient steps on responses of the current policy, with their rewards."""
        batch = batch.clean()
        log_ref, gain = log_ref_and_gain(self.ebm, batch, self.config.forbidden_log_weight)
        log_pi = self.log_pi(batch)
        old = log_pi.detach()
        metrics = {"losses/elbo": elbo(old, log_ref, gain)}
        for epoch in range(self.epochs):
            if epoch:
                log_pi = self.log_pi(batch)
            loss = self.loss(batch, log_pi, old, log_ref, gain)
            metrics["losses/loss"] = loss.detach()
            metrics |= self.learner.descend(loss, progress)
        self.batch_size.saw(self.learner.parameters)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.batch_size.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch_size.load_state_dict(state, self.learner.parameters)

    def log_pi(self, batch: Batch) -> Float[Tensor, "B T"]:
        """log pi of the tokens, 0 past the end."""
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        return token_values(log_policy(q), batch)


def elbo(log_pi: Tensor, log_ref: Tensor, gain: Tensor) -> Tensor:
    """E[log-weight - log pi], the lower bound of log Z: arXiv 2512.15605, App. A.8."""
    return (gain + (log_ref - log_pi).sum(1)).mean()
