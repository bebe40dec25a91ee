"""What a fixed point is computed from: the reward in nats and the reference, of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.soft_bellman import expectation, log_policy, sequence_log_probs
from rl_ebm.tokens import TokenSpace

Rule = Callable[[Tensor, Tensor], Tensor]
"""(log_ref, q), each (n, A), to log pi: what a policy is at states whose returns are known"""


class Penalty(NamedTuple):
    """A KL penalty in a policy gradient: :mod:`rl_ebm.fixed_points.penalties` explains it."""

    estimator: str
    """k1, k2 or k3"""
    place: str
    """reward or loss"""
    level: str = "token"
    """token or sequence"""
    group_std: bool = False
    """whether advantages are divided by the standard deviation of their (large) group"""
    mean_tokens: bool = False
    """whether the loss of a response is the mean over its tokens, not their sum"""
    baseline: bool = True
    """whether the mean return is taken off each return; it matters with ``mean_tokens`` alone"""
    ratio: bool = False
    """whether a penalty in the loss is multiplied by pi / pi_old, whose gradient counts"""


@dataclass(frozen=True)
class FixedPoint:
    """Where an objective ends when it starts from p_ref and has its exact expected gradient.

    Attributes:
        log_law: log-probability of every response, in enumeration order; None where the limit
            was not computed.
        degenerate: whether it is on the boundary: some response that p_ref allows has
            probability 0; None where that is not known.
        how: "stated" (by the objective's own proof, and not computed), "closed form", "root" (a
            scalar equation around a closed form), "quadrature", "iteration", "flow", or why there
            is no law.
        other_roots: further interior laws at which the expected gradient vanishes.
        sampler: whether it depends on what the responses are drawn from: drawn from another
            policy than the one that the agent draws from, the same loss would end elsewhere; None
            where that is not known.
    """

    log_law: Tensor | None
    degenerate: bool | None = False
    how: str = "closed form"
    other_roots: tuple[Tensor, ...] = ()
    sampler: bool | None = False


@dataclass(frozen=True)
class Problem:
    """One prompt's EBM, float64, in nats.

    Attributes:
        space: the responses.
        log_ref: log p_ref of every action, by depth: (branching**t, A), -inf where forbidden.
        g: R / beta of the response that ends with each action, by depth; 0 where none ends.
        log_target: log p* of every response, in enumeration order.
        beta: reward units per nat.
    """

    space: TokenSpace
    log_ref: list[Tensor]
    g: list[Tensor]
    log_target: Float[Tensor, "N"]
    beta: float
    limits: dict[tuple[str, str], FixedPoint] = field(default_factory=dict, compare=False)
    """of flows that were followed before: they take their time"""

    @property
    def log_ref_responses(self) -> Float[Tensor, "N"]:
        """log p_ref of every response; it need not sum to 1 (the counting measure)."""
        return sequence_log_probs(self.log_ref, self.space)

    @property
    def start_law(self) -> Float[Tensor, "N"]:
        """log-probability of every response under :meth:`start`."""
        return sequence_log_probs(self.start(), self.space)

    @property
    def g_responses(self) -> Float[Tensor, "N"]:
        """R / beta of every response."""
        if self.space.eos_id is None:
            return self.g[-1].flatten()
        return torch.cat([t[:, self.space.eos_id] for t in self.g])

    @property
    def allowed(self) -> Bool[Tensor, "N"]:
        """Responses that p_ref allows."""
        return ~torch.isneginf(self.log_ref_responses)

    def at_ends(self, values: Float[Tensor, "N"]) -> list[Tensor]:
        """Tables by depth that hold a value at the action that ends each response, else 0."""
        found = [torch.zeros_like(g) for g in self.g]
        if self.space.eos_id is None:
            found[-1] = values.view_as(found[-1])
            return found
        for table, part in zip(found, values.split([len(g) for g in self.g]), strict=True):
            table[:, self.space.eos_id] = part
        return found

    def with_returns(self, g: Float[Tensor, "N"]) -> Problem:
        """The same with other values, in nats, at the ends of the responses."""
        return replace(self, g=self.at_ends(g), limits={})

    def start(self) -> list[Tensor]:
        """log pi of p_ref, normalised at each state: where a flow starts."""
        return [log_policy(t) for t in self.log_ref]

    def backward(self, rule: Rule, scale: float = 1.0) -> list[Tensor]:
        """log pi by depth of the policy that follows a rule at every state.

        The rule sees q, the expected return from there on under the policy itself: the plain
        one, without any penalty. Rewards are divided by ``scale`` first.
        """
        found: list[Tensor] = []
        v: Tensor | None = None
        for log_ref, g in zip(reversed(self.log_ref), reversed(self.g), strict=True):
            q = g / scale if v is None else g / scale + self.space.spread(v, fill=0.0)
            q = q.masked_fill(torch.isneginf(log_ref), 0.0)
            found.append(rule(log_ref, q))
            v = expectation(found[-1], q).sum(-1)
        return found[::-1]
