"""Phrases: the automaton of Knuth, Morris and Pratt reads a response once, without going back."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from operator import index

import torch

from rl_ebm.automata.machine import Machine, deterministic
from rl_ebm.automata.windows import check_size
from rl_ebm.messages.arguments import shown
from rl_ebm.tokens import TokenSpace, check_space


def check_score(score: object) -> None:
    """Raise unless a score is a number below +inf.

    Raises:
        TypeError: no number.
        ValueError: NaN, or +inf.
    """
    if not isinstance(score, Real):
        raise TypeError(f"score must be a number, got {shown(score)}")
    if not score < float("inf"):
        raise ValueError(f"score must be a number below +inf, got {score}")


def check_ids(space: TokenSpace, ids: Sequence[int], what: str) -> list[int]:
    """Token ids as ints.

    Raises:
        TypeError: no token ids.
        ValueError: none, one out of range, or EOS before the end.
    """
    check_space(space)
    try:
        found = [index(token) for token in ids]
    except TypeError:
        raise TypeError(f"{what} must be a list of token ids, got {shown(ids)}") from None
    if not found:
        raise ValueError(f"{what} is empty: give at least one token id")
    wrong = [token for token in found if not 0 <= token < space.vocab_size]
    if wrong:
        raise ValueError(f"{what} holds {wrong[0]}, ids are in [0, {space.vocab_size})")
    if space.eos_id in found[:-1]:
        raise ValueError(f"{what} goes on after EOS (id {space.eos_id}), as no response does")
    return found


def _check_possible(space: TokenSpace, ids: list[int]) -> None:
    """Raise ValueError where the phrase is longer than every response."""
    ends = space.eos_id is not None and ids[-1] != space.eos_id
    longest = space.max_length - ends
    if len(ids) > longest:
        raise ValueError(
            f"no response can hold the phrase: it has {len(ids):,} tokens, and a response at most "
            f"{longest:,}" + (" beside its EOS" if ends else "")
        )


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
    _check_possible(space, ids)
    check_size(len(ids) + 1, space.vocab_size, "the phrase", "give a shorter one")
    next_ = torch.zeros(len(ids) + 1, space.vocab_size, dtype=torch.int64)
    border = 0  # where reading the phrase from its second token on leads
    for i, token in enumerate(ids):
        next_[i] = next_[border]
        next_[i, token] = i + 1
        if i:
            border = int(next_[border, token])
    next_[-1] = next_[border]
    return next_, len(ids)
