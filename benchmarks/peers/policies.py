"""Foreign networks as policies of ours, so that one verifier measures everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rl_ebm.tokens import TokenSpace

CHUNK = 8192
"""prefixes that are evaluated at once"""


class PrefixPolicy:
    """A policy from a function of single prefixes; each distinct prefix is evaluated once.

    Where prefixes are too many to be numbered all of them are evaluated: hardly two are the same.

    Args:
        space: responses of fixed length.
        rows: (n, T) tokens with -1 past the end of each prefix, to (n, A) logits.
    """

    def __init__(self, space: TokenSpace, rows: Callable[[Tensor], Tensor]) -> None:
        self.space, self.rows = space, rows

    @torch.no_grad()
    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
        """(B, T, A): row t from ``tokens[:, :t]``."""
        length = self.space.max_length
        if self.space.num_states >= 2**63:
            shown = torch.arange(length) < torch.arange(length)[:, None]
            every = torch.where(shown, tokens[:, None], -1)
            return self._evaluate(every.flatten(0, 1)).unflatten(0, every.shape[:2])
        found, place = torch.unique(self.space.state_ids(tokens), return_inverse=True)
        where = torch.arange(place.numel())
        first = torch.empty(len(found), dtype=torch.int64).scatter_(0, place.flatten(), where)
        row, depth = first // length, first % length
        prefixes = tokens[row].masked_fill(torch.arange(length) >= depth[:, None], -1)
        return self._evaluate(prefixes)[place]

    def _evaluate(self, prefixes: Tensor) -> Tensor:
        return torch.cat([self.rows(part) for part in prefixes.split(CHUNK)])

    def start(self, prompt_ids: Tensor) -> list[Any]:
        """Nothing read yet: the (B, T) prefixes, and how many tokens they have."""
        return [torch.full((len(prompt_ids), self.space.max_length), -1), 0]

    @torch.no_grad()
    def step(self, state: list[Any], tokens: Tensor | None) -> Tensor:
        """(B, A): of the prefixes with one more token each."""
        if tokens is not None:
            state[0][:, state[1]] = tokens
            state[1] += 1
        return self._evaluate(state[0])


def one_hot(prefixes: Tensor, vocab_size: int) -> Tensor:
    """(n, T) tokens to (n, T * A) zeros and ones: nothing where the token is -1."""
    hot = prefixes[..., None] == torch.arange(vocab_size, device=prefixes.device)
    return hot.flatten(1).float()


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())
