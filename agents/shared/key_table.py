"""A hash table from integers to integers, by tensors: whole batches are looked up at once.

Open addressing with linear probing (Knuth, The Art of Computer Programming 3, 6.4), at most half
full, so that two or three rounds find nearly every key.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

EMPTY = -1
"""no key, and what stands for a key that is not there"""
_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed number: Fibonacci hashing


class KeyTable:
    """Numbers >= 0 by keys >= 0; it grows by itself.

    Args:
        device: where its slots live.
        room: keys that it has room for to begin with.
    """

    def __init__(self, device: torch.device | str = "cpu", room: int = 1024) -> None:
        self.count = 0
        self.keys, self.values = _slots(2 * room, device)

    def find(self, keys: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
        """The numbers of keys, -1 where there are none, as for keys below 0."""
        flat = keys.reshape(-1)
        found = torch.full_like(flat, EMPTY)
        left = (flat >= 0).nonzero()[:, 0]
        wanted = flat[left]
        slot = self._home(wanted)
        while len(left):
            here = self.keys[slot]
            hit = here == wanted
            found[left[hit]] = self.values[slot[hit]]
            on = ~hit & (here != EMPTY)
            left, wanted, slot = left[on], wanted[on], self._next(slot[on])
        return found.reshape(keys.shape)

    def add(self, keys: Int64[Tensor, "n"], values: Int64[Tensor, "n"]) -> None:
        """Keep new keys, each once, with their numbers."""
        if 2 * (self.count + len(keys)) > len(self.keys):
            old = self.keys != EMPTY
            kept = self.keys[old], self.values[old]
            self.keys, self.values = _slots(2 * (self.count + len(keys)), self.keys.device)
            self._place(*kept)
        self._place(keys, values)
        self.count += len(keys)

    def _place(self, keys: Int64[Tensor, "n"], values: Int64[Tensor, "n"]) -> None:
        slot = self._home(keys)
        while len(keys):
            free = self.keys[slot] == EMPTY
            self.keys[slot[free]] = keys[free]  # of several to one slot any: the others see it
            mine = self.keys[slot] == keys
            self.values[slot[mine]] = values[mine]
            keys, values, slot = keys[~mine], values[~mine], self._next(slot[~mine])

    def _home(self, keys: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
        # The highest bits of the product: every bit of a key has moved them.
        bits = len(self.keys).bit_length() - 1
        return ((keys * _GOLDEN) >> (64 - bits)) & (len(self.keys) - 1)

    def _next(self, slot: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
        return (slot + 1) & (len(self.keys) - 1)


def _slots(
    least: int, device: torch.device | str
) -> tuple[Int64[Tensor, "slots"], Int64[Tensor, "slots"]]:
    """Empty slots, a power of two of at least twice so many."""
    size = 1 << least.bit_length()
    keys = torch.full((size,), EMPTY, dtype=torch.int64, device=device)
    return keys, torch.empty_like(keys)
