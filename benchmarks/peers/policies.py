"""Foreign networks as policies of ours, so that one verifier measures everybody."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rl_ebm.tokens import TokenSpace

CHUNK = 8192
"""prefixes that are evaluated at once"""


class PrefixPolicy:
    """A policy from a function of single prefixes; each distinct prefix is evaluated once.

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
        found, place = torch.unique(self.space.state_ids(tokens), return_inverse=True)
        where = torch.arange(place.numel())
        first = torch.empty(len(found), dtype=torch.int64).scatter_(0, place.flatten(), where)
        row, depth = first // length, first % length
        prefixes = tokens[row].masked_fill(torch.arange(length) >= depth[:, None], -1)
        out = torch.cat([self.rows(part) for part in prefixes.split(CHUNK)])
        return out[place]


def one_hot(prefixes: Tensor, vocab_size: int) -> Tensor:
    """(n, T) tokens to (n, T * A) zeros and ones: nothing where the token is -1."""
    hot = prefixes[..., None] == torch.arange(vocab_size, device=prefixes.device)
    return hot.flatten(1).float()


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in module.parameters())
