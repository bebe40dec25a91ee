"""Counters: sums modulo a number, and brackets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import Machine, deterministic
from rl_ebm.rewards.base import check_values
from rl_ebm.rewards.phrases import check_ids, check_score
from rl_ebm.tokens import TokenSpace


def modular(
    space: TokenSpace,
    scores: Float[Tensor, "m"] | Sequence[float],
    values: Int64[Tensor, "A"] | Sequence[int] | None = None,
) -> Machine:
    """States are the sum so far."""
    final = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    if final.ndim != 1 or not len(final):
        raise ValueError(f"scores has shape {tuple(final.shape)}, expected (m,), one for each rest")
    check_values(final, "scores")
    values = torch.arange(space.vocab_size) if values is None else torch.as_tensor(values).cpu()
    if values.shape != (space.vocab_size,) or values.is_floating_point():
        raise ValueError(f"values must be {space.vocab_size} integers, one for each token")
    if space.eos_id is not None:
        values = values.index_fill(0, torch.tensor([space.eos_id]), 0)
    next_ = (torch.arange(len(final))[:, None] + values) % len(final)
    return deterministic(next_, torch.zeros(next_.shape), final)


def brackets(
    space: TokenSpace, opening: int, closing: int, depth: int, score: float | int
) -> Machine:
    """States are the depth, and one for what cannot be balanced any more."""
    check_ids(space, [opening], "opening")
    check_ids(space, [closing], "closing")
    check_score(score)
    if opening == closing or space.eos_id in (opening, closing):
        raise ValueError(
            f"opening and closing must be two tokens other than EOS, got {opening} and {closing}"
        )
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}")
    lost = depth + 1
    levels = torch.arange(depth + 2)
    next_ = levels[:, None].repeat(1, space.vocab_size)
    next_[:, opening] = levels + 1  # beyond the last level: lost
    next_[:, closing] = levels - 1
    next_[0, closing] = next_[lost] = lost
    final = torch.zeros(depth + 2, dtype=torch.float64)
    final[0] = float(score)
    return deterministic(next_, torch.zeros(next_.shape), final)
