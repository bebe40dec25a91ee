"""What agents share that learn from anybody's responses: who draws them, replay, annealing.

Their losses vanish at q* on every path, whoever drew it: no importance weights are needed, and
exploration and replay move the speed, not the fixed point (where every response keeps a chance).
How responses were drawn, by temperature or by epsilon, is never part of a log pi in a loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.shared.account import Behaviour, root_values
from rl_ebm.agents.shared.base import BaseAgent
from rl_ebm.agents.shared.batch_size import BatchSize, most_responses
from rl_ebm.agents.shared.learner import (
    check_batch_size,
    check_rates,
    draw_prompts,
    immediate_log_weights,
)
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.agents.shared.replay import Replay, check_rows
from rl_ebm.fixed_points import FixedPoint, Problem, forbids, law_of, stand_ins, target
from rl_ebm.policies.base import Policy
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.tabular import Uniform
from rl_ebm.tokens import Batch


@checked_options
class OffPolicyOptions:
    """Options of every agent that learns from anybody's responses."""

    batch_size: int | None = None
    """new responses in a step; None for as many as the noise of the gradient asks for: 64 (a whole
    group, where that is more), and twice as many whenever it dominates, up to 2048
    (fewer where that is many states to evaluate)"""
    explore: float | int = 0.5
    """share of them drawn from the reference (uniform without one), the rest from the policy"""
    temperature: float | int = 1.0
    """of the policy's own draws; above 1 they explore"""
    epsilon: float | int = 0.0
    """chance of each token of the policy's own draws to be a uniform one instead"""
    replay_size: int = 0
    """responses kept for replay; 0 for none"""
    replay_batch: int = 0
    """replayed responses in a step, beside the new ones"""
    anneal: float | int = 0.0
    """share of the run over which the log-weights grow from 0 to their full size"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 10.0
    """gradients are clipped to this norm"""
    forbidden_log_weight: float | int | None = None
    """log-weight trained on in the place of -inf, nats"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        check_batch_size("batch_size", 1 if self.batch_size is None else self.batch_size)
        for name in ("explore", "epsilon", "anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature}")
        if self.replay_size < 0 or self.replay_batch < 0:
            raise ValueError("replay_size and replay_batch must be >= 0")
        if self.replay_batch > 0 and self.replay_size == 0:
            raise ValueError("replay_batch needs replay_size > 0")
        for name in ("replay_size", "replay_batch"):
            check_batch_size(name, getattr(self, name) or 1)


def fixed_point(options: OffPolicyOptions, problem: Problem) -> FixedPoint:
    """The EBM, whoever draws; with the stand-in that is trained on where p_ref forbids."""
    f = options.forbidden_log_weight
    if f is None or not forbids(problem):
        return target(options, problem)
    if options.explore == 1:  # nobody draws what is forbidden: what it gets is left open
        return FixedPoint(None, degenerate=None, how="not determined")
    r = [a + b for a, b in zip(problem.log_ref, problem.g, strict=True)]
    return FixedPoint(law_of(stand_ins(r, problem.space, f), problem.space))


class OffPolicyAgent(BaseAgent, ABC):
    """Sampling, replay and the step of such an agent; a subclass is its :meth:`loss`."""

    Config = OffPolicyOptions
    weights_in = torch.float32
    """precision of the log-weights that its loss is given"""

    def begin(self, teacher: Policy | None) -> None:
        """Who explores, and the replay."""
        ebm = self.ebm
        self.explorer: Policy = Uniform(ebm.space) if ebm.reference is None else ebm.reference
        self.replay = Replay(max(1, self.config.replay_size), ebm.space.max_length, ebm.device)
        most = most_responses(ebm)
        self.batch_size = BatchSize(self.config.batch_size, self.fewest, most)

    @property
    def fewest(self) -> int:
        """Responses that a step needs."""
        return 1

    @abstractmethod
    def loss(self, batch: Batch, r: Float[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of responses, and what to log; r are the log-weights of the tokens."""

    def prompts(self) -> Int64[Tensor, "B"]:
        """The prompts of the next responses."""
        return draw_prompts(self.batch_size.now, self.ebm.num_prompts, 1, self.generator)

    def replayed(self) -> Batch:
        """Responses of earlier steps."""
        return self.replay.sample(self.config.replay_batch, self.generator)

    @property
    def responses(self) -> int:
        """How many responses a step draws."""
        return self.batch_size.now

    @property
    def explored(self) -> int:
        """How many responses of a step are the explorer's; they come first."""
        count: int = round(self.config.explore * self.responses)
        return count

    @property
    def own_rows(self) -> slice | None:
        """The rows of :meth:`sample` that are draws of the policy as it is; None without one."""
        cfg = self.config
        tempered = cfg.temperature != 1 or cfg.epsilon != 0
        return None if tempered or self.explored == self.responses else slice(self.explored, None)

    def sample(self) -> Batch | None:
        """Responses of the policy and of the explorer."""
        cfg, space = self.config, self.ebm.space
        prompt_ids = self.prompts()
        others = self.explored
        # Shuffled, so that every prompt gets its share of both.
        order = torch.randperm(len(prompt_ids), generator=self.generator, device=prompt_ids.device)
        parts = [
            sample(policy, space, len(ids), self.generator, ids, temperature, epsilon)
            for policy, ids, temperature, epsilon in (
                (self.explorer, prompt_ids[order[:others]], 1.0, 0.0),
                (self.policy, prompt_ids[order[others:]], cfg.temperature, cfg.epsilon),
            )
            if len(ids)
        ]
        return Batch.cat(parts)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on a batch of anybody's responses with their rewards."""
        batch = batch.clean()
        if self.config.replay_size:
            fresh = batch
            if self.config.replay_batch and len(self.replay):
                batch = Batch.cat([batch, self.replayed()])
            self.replay.add(fresh)
        loss, metrics = self.loss(batch, self.log_weights(batch, progress))
        metrics = {"losses/loss": loss.detach()} | metrics
        metrics |= self.learner.descend(loss, progress)
        self.batch_size.saw(self.learner.parameters)
        return metrics

    def log_weights(self, batch: Batch, progress: float = 1.0) -> Float[Tensor, "B T"]:
        """r of each token, 0 past the end, at its size at this point of the run."""
        stand_in = self.config.forbidden_log_weight
        r = immediate_log_weights(self.ebm, batch, stand_in, self.weights_in)
        if self.config.anneal == 0:
            return r
        scale = min(1.0, progress / float(self.config.anneal))
        return r * scale

    def behaviour(self) -> Behaviour | None:
        """The policy and the explorer draw."""
        cfg = self.config
        return Behaviour(
            1 - cfg.explore, cfg.explore, temperature=cfg.temperature, epsilon=cfg.epsilon
        )

    def learned_log_z(self) -> Float[Tensor, "P"] | None:
        """V at the root, where raw logits are values."""
        return root_values(self.policy, self.ebm) if self.logits_are_values else None

    def state_dict(self) -> dict[str, Any]:
        return (
            super().state_dict()
            | self.batch_size.state_dict()
            | {
                "replay": self.replay.state_dict(),
                "extra": [parameter.detach().clone() for parameter in self.extra],
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.replay.load_state_dict(state["replay"])
        self.batch_size.load_state_dict(state, self.learner.parameters)
        kept = torch.arange(len(self.replay), device=self.ebm.device)
        check_rows(self.replay.rows.take(kept), self.ebm.space, self.ebm.num_prompts)
        with torch.no_grad():
            for parameter, value in zip(self.extra, state["extra"], strict=True):
                parameter.copy_(value)
