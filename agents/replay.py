"""A ring buffer of (prompt, tokens, length, R); log-probabilities are recomputed when read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_ebm.tokens import Batch


class Replay:
    """The last ``capacity`` responses with their rewards, on the device.

    Args:
        capacity: rows kept, at least 1.
        max_length: T.
        device: where the rows live.
    """

    def __init__(self, capacity: int, max_length: int, device: torch.device | str = "cpu") -> None:
        self.rows = Batch(
            torch.zeros(capacity, max_length, dtype=torch.int64, device=device),
            torch.ones(capacity, dtype=torch.int64, device=device),
            torch.zeros(capacity, dtype=torch.int64, device=device),
            torch.zeros(capacity, dtype=torch.float64, device=device),
        )
        self.capacity = capacity
        self.size = self.next = 0

    def __len__(self) -> int:
        return self.size

    def add(self, batch: Batch) -> None:
        """Keep a batch, in the place of the oldest rows."""
        n = min(len(batch), self.capacity)
        places = (torch.arange(n, device=batch.tokens.device) + self.next) % self.capacity
        for kept, new in zip(_columns(self.rows), _columns(batch), strict=True):
            kept[places] = new[-n:].to(kept.dtype)
        self.next = (self.next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, n: int, generator: torch.Generator) -> Batch:
        """n rows, uniformly, with replacement."""
        device = self.rows.tokens.device
        places = torch.randint(self.size, (n,), generator=generator, device=device)
        return Batch(*(column[places] for column in _columns(self.rows)))

    def state_dict(self) -> dict[str, Any]:
        columns = [column[: self.size].clone() for column in _columns(self.rows)]
        return {"columns": columns, "size": self.size, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size, self.next = state["size"], state["next"]
        for kept, column in zip(_columns(self.rows), state["columns"], strict=True):
            kept[: self.size] = column


def _columns(batch: Batch) -> list[Tensor]:
    return [batch.tokens, batch.lengths, batch.prompt_ids, batch.rewards()]
