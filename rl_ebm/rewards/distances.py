"""Distances to a word, by automata that read a response from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_ebm.automata import Machine, deterministic
from rl_ebm.rewards.phrases import check_ids, check_score
from rl_ebm.tokens import TokenSpace

MAX_STATES = 100_000


def _check(space: TokenSpace, word: Sequence[int], score: float | int) -> list[int]:
    ids = check_ids(space, word, "the word")
    if not abs(score) < float("inf"):
        raise ValueError(f"score must be finite, got {score}")
    check_score(score)
    if space.eos_id in ids:
        raise ValueError("the word must be given without EOS")
    return ids


def hamming(space: TokenSpace, word: Sequence[int], score: float | int) -> Machine:
    """States are the position, up to the word's end."""
    ids = _check(space, word, score)
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
    so that there are finitely many rows.
    """
    ids = _check(space, word, score)
    known: dict[tuple[int, ...], int] = {tuple(range(len(ids) + 1)): 0}
    rows, next_ = list(known), []
    letters = sorted(set(ids))
    i = 0
    while i < len(rows):
        row = rows[i]
        targets = {}
        for letter in (*letters, None):
            new = [row[0] + 1]
            for j, expected in enumerate(ids):
                new.append(min(new[j] + 1, row[j + 1] + 1, row[j] + (letter != expected)))
            key = tuple(x - new[0] for x in new)
            if key not in known:
                known[key] = len(rows)
                rows.append(key)
            targets[letter] = known[key]
        line = torch.full((space.vocab_size,), targets[None])
        line[letters] = torch.tensor([targets[letter] for letter in letters])
        if space.eos_id is not None:
            line[space.eos_id] = i
        next_.append(line)
        i += 1
        if len(rows) > MAX_STATES:
            raise ValueError(
                f"the edit distance to a word of {len(ids)} tokens needs more than {MAX_STATES:,} "
                "states: give a shorter word"
            )
    weight = torch.full((len(rows), space.vocab_size), float(score), dtype=torch.float64)
    if space.eos_id is not None:
        weight[:, space.eos_id] = 0.0
    final = float(score) * torch.tensor([row[-1] for row in rows], dtype=torch.float64)
    return deterministic(torch.stack(next_), weight, final)
