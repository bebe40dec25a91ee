"""Numbers in the place of log-weights of -inf: what is trained on them ends at another EBM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.problem import Problem
from rl_ebm.soft_bellman import log_policy, q_from_r, sequence_log_probs
from rl_ebm.tokens import TokenSpace


def forbids(problem: Problem) -> bool:
    """Whether p_ref forbids an action that the space allows."""
    mask = problem.space.action_mask()
    pairs = zip(problem.log_ref, mask, strict=True)
    return any(bool((torch.isneginf(t) & allowed).any()) for t, allowed in pairs)


def stand_ins(tables: Sequence[Tensor], space: TokenSpace, log_weight: float | int) -> list[Tensor]:
    """Tables by depth with a number, nats, where an action that the space allows has -inf."""
    return [
        t.masked_fill(torch.isneginf(t) & allowed, float(log_weight))
        for t, allowed in zip(tables, space.action_mask(), strict=True)
    ]


def law_of(r: Sequence[Tensor], space: TokenSpace) -> Float[Tensor, "N"]:
    """log-probability of every response under the EBM with these immediate log-weights."""
    return sequence_log_probs([log_policy(q) for q in q_from_r(r, space)], space)
