"""Distances to a word, by automata that read a response from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rl_ebm.automata.machine import Machine, deterministic
from rl_ebm.automata.phrases import check_ids, check_score
from rl_ebm.automata.windows import check_size
from rl_ebm.tokens import TokenSpace

MAX_WORK = 40_000_000
"""entries of rows, for all letters"""
Ints = npt.NDArray[np.int64]
Steps = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


def _check(space: TokenSpace, word: Sequence[int], score: float | int) -> list[int]:
    ids = check_ids(space, word, "the word")
    check_score(score)
    if not abs(score) < float("inf"):
        raise ValueError(f"score must be finite, got {score}")
    if space.eos_id in ids:
        raise ValueError("the word must be given without EOS")
    return ids


def hamming(space: TokenSpace, word: Sequence[int], score: float | int) -> Machine:
    """States are the position, up to the word's end."""
    ids = _check(space, word, score)
    check_size(len(ids) + 1, space.vocab_size, "the word", "give a shorter one")
    weight = torch.full((len(ids) + 1, space.vocab_size), float(score), dtype=torch.float64)
    weight[range(len(ids)), ids] = 0.0
    following = torch.arange(1, len(ids) + 2).clamp(max=len(ids))
    next_ = following[:, None].repeat(1, space.vocab_size)
    final = float(score) * (len(ids) - torch.arange(len(ids) + 1)).double()
    if space.eos_id is not None:
        weight[:, space.eos_id] = 0.0
        next_[:, space.eos_id] = torch.arange(len(ids) + 1)
    return deterministic(next_, weight, final)


def edit_distance(space: TokenSpace, word: Sequence[int], score: float | int) -> Machine:
    """States are rows of the table of Wagner and Fischer, less their first entry.

    A row is the distance of what was read to each prefix of the word. Its first entry grows by
    one with every token, and is paid then; the other entries less it stay in [-len(word), 0 ...],
    so that there are finitely many rows. Neighbours differ by 1 at most: the differences are kept.
    """
    ids = _check(space, word, score)
    a, letters = space.vocab_size, sorted(set(ids))
    check_size(len(ids) + 1, a, "the word", "give a shorter one")
    targets, ends = _rows(space, ids, letters)
    check_size(len(targets), a, "the edit distance to the word", "give a shorter one")
    next_ = torch.from_numpy(targets[:, -1:]).repeat(1, a)
    next_[:, letters] = torch.from_numpy(targets[:, :-1])
    weight = torch.full((len(targets), a), float(score), dtype=torch.float64)
    if space.eos_id is not None:
        next_[:, space.eos_id] = torch.arange(len(targets))
        weight[:, space.eos_id] = 0.0
    return deterministic(next_, weight, float(score) * torch.from_numpy(ends).double())


def _rows(space: TokenSpace, ids: list[int], letters: list[int]) -> tuple[Ints, Ints]:
    """The rows that responses reach, breadth first.

    Returns:
        The row after each letter of the word and after any other token, (rows, letters + 1); and
        the last entry of each row less its first.
    """
    expected = np.array(ids)
    frontier = np.ones((1, len(ids)), dtype=np.int8)
    known = {frontier[0].tobytes(): 0}
    targets, ends = [], []
    for _ in range(space.max_length + 1):
        ends.append(frontier.sum(1, dtype=np.int64))
        following = [_after(frontier, expected != letter) for letter in (*letters, None)]
        found = np.empty((len(frontier), len(following)), dtype=np.int64)
        new = []
        for column, rows in enumerate(following):
            for i, row in enumerate(rows):
                key = row.tobytes()
                if key not in known:
                    known[key] = len(known)
                    new.append(row)
                found[i, column] = known[key]
        targets.append(found)
        if len(known) * (len(ids) + 1) * len(following) > MAX_WORK:
            raise ValueError(
                f"the edit distance to a word of {len(ids):,} tokens needs more than "
                f"{len(known):,} states, which are too many: give a shorter word"
            )
        if not new:
            break
        frontier = np.stack(new)
    count = sum(map(len, targets))
    # What the last tokens lead to is never read on.
    return np.minimum(np.concatenate(targets), count - 1), np.concatenate(ends)


def _after(rows: Steps, differs: Mask) -> Steps:
    """Rows, as differences of neighbours, after one more token."""
    out = np.empty_like(rows)
    # Differences of the new row's entry to the old row's entry of the same column.
    grown = np.ones(len(rows), dtype=np.int8)
    for j, unlike in enumerate(differs):
        step = rows[:, j]
        best = np.minimum(np.minimum(grown + 1, step + 1), np.int8(unlike))
        # Entry j + 1 less entry j of the new row; the old row's j-th is the origin.
        out[:, j] = best - grown
        grown = best - step
    return out
