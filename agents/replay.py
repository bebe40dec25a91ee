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
        """Keep a batch, in the place of the oldest rows; rows to one prompt side by side."""
        n = min(len(batch), self.capacity)
        kept = batch.prompt_ids[-n:].argsort(stable=True) + len(batch) - n
        batch = batch.take(kept)
        places = (torch.arange(n, device=batch.tokens.device) + self.next) % self.capacity
        for column, new in zip(columns(self.rows), columns(batch), strict=True):
            column[places] = new.to(column.dtype)
        self.next = (self.next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, n: int, generator: torch.Generator, run: int = 1) -> Batch:
        """n rows, uniformly, with replacement: n // run times so many that stand side by side."""
        device = self.rows.tokens.device
        starts = torch.randint(self.size, (n // run,), generator=generator, device=device)
        places = (starts[:, None] + torch.arange(run, device=device)).flatten() % self.size
        return Batch(*(column[places] for column in columns(self.rows)))

    def state_dict(self) -> dict[str, Any]:
        kept = [column[: self.size].clone() for column in columns(self.rows)]
        return {"columns": kept, "size": self.size, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size, self.next = state["size"], state["next"]
        for kept, column in zip(columns(self.rows), state["columns"], strict=True):
            kept[: self.size] = column


def columns(batch: Batch) -> list[Tensor]:
    """The four tensors of scored responses, the same memory."""
    return [batch.tokens, batch.lengths, batch.prompt_ids, batch.rewards()]
