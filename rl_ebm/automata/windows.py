"""Machines that remember the last tokens, and how large a table may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_ebm.automata.machine import Machine, deterministic
from rl_ebm.messages.memory import check_fits
from rl_ebm.messages.words import bytes_text, count_text

MAX_TABLE = 2**26
"""transitions that a machine may list: 12 bytes each, and three times as much on the way"""


def check_size(states: int, vocab_size: int, what: str, instead: str) -> None:
    """Raise ValueError, before any memory is taken, where a machine would be too large.

    Args:
        what: "the phrase", with its verb's form of singular.
        instead: what to do.
    """
    if states * vocab_size > MAX_TABLE:
        raise ValueError(
            f"{what} needs {count_text(states)} states over {vocab_size:,} tokens "
            f"({bytes_text(12 * states * vocab_size)}), which are too many: {instead}"
        )
    if states * vocab_size > 2**20:  # less is not worth a look at what is free
        check_fits(48 * states * vocab_size, what, instead)


def check_window(order: int, vocab_size: int, what: str, instead: str) -> None:
    """:func:`check_size` of :func:`window`."""
    # A power of two alone takes long to find out at a very large order.
    states = sum(vocab_size**i for i in range(min(order, MAX_TABLE.bit_length() + 1)))
    check_size(states, vocab_size, what, instead)


def window(vocab_size: int, log_weights: Sequence[Tensor]) -> Machine:
    """States are the last n - 1 tokens, or all of them where there are fewer.

    Args:
        log_weights: (A^i, A) for i = 0, ..., n - 1: of every token after each history of i; that of
            index h followed by a token has the index h * A + token.
    """
    a, n = vocab_size, len(log_weights)
    counts = [a**i for i in range(n)]
    next_ = torch.empty(sum(counts), a, dtype=torch.int32)
    for i, count in enumerate(counts):
        rows = slice(sum(counts[:i]), sum(counts[: i + 1]))
        following = torch.arange(count * a, dtype=torch.int32).view(count, a)
        # The oldest token of a full history is forgotten.
        full = i == n - 1
        next_[rows] = following % counts[-1] if full else following
        next_[rows] += sum(counts[: n - 1]) if full else rows.stop
    return deterministic(next_, torch.cat(list(log_weights)))
