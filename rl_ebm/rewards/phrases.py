"""Phrases: the automaton of Knuth, Morris and Pratt reads a response once, without going back."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

from rl_ebm.automata import Machine, deterministic
from rl_ebm.tokens import TokenSpace


def check_score(score: float | int) -> None:
    """Raise ValueError unless a score is a number below +inf."""
    if not score < float("inf"):
        raise ValueError(f"score must be a number below +inf, got {score}")


def check_ids(space: TokenSpace, ids: Sequence[int], what: str) -> list[int]:
    """Token ids as ints.

    Raises:
        ValueError: none, one out of range, or EOS before the end.
    """
    try:
        found = [index(token) for token in ids]
    except TypeError:
        raise ValueError(f"{what} must be a list of token ids, got {ids!r}") from None
    if not found:
        raise ValueError(f"{what} is empty: give at least one token id")
    wrong = [token for token in found if not 0 <= token < space.vocab_size]
    if wrong:
        raise ValueError(f"{what} holds {wrong[0]}, ids are in [0, {space.vocab_size})")
    if space.eos_id in found[:-1]:
        raise ValueError(f"{what} goes on after EOS (id {space.eos_id}), as no response does")
    return found


def contains(space: TokenSpace, phrase: Sequence[int], score: float | int) -> Machine:
    """``score`` for the first occurrence."""
    next_, last = _matcher(space, phrase)
    next_[last] = last
    return _paid(next_, last, score, again=False)


def counts(space: TokenSpace, phrase: Sequence[int], score: float | int) -> Machine:
    """``score`` for every occurrence."""
    next_, last = _matcher(space, phrase)
    return _paid(next_, last, score, again=True)


def _paid(next_: torch.Tensor, last: int, score: float | int, again: bool) -> Machine:
    check_score(score)
    weight = torch.zeros(next_.shape, dtype=torch.float64)
    weight[next_ == last] = float(score)
    if not again:
        weight[last] = 0.0
    return deterministic(next_, weight)


def _matcher(space: TokenSpace, phrase: Sequence[int]) -> tuple[torch.Tensor, int]:
    """Transitions between the lengths of the longest prefix that was just read, and the last."""
    ids = check_ids(space, phrase, "the phrase")
    next_ = torch.zeros(len(ids) + 1, space.vocab_size, dtype=torch.int64)
    border = 0  # where reading the phrase from its second token on leads
    for i, token in enumerate(ids):
        next_[i] = next_[border]
        next_[i, token] = i + 1
        if i:
            border = int(next_[border, token])
    next_[-1] = next_[border]
    return next_, len(ids)
