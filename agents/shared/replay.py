"""A ring buffer of (prompt, tokens, length, R); log-probabilities are recomputed when read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_ebm.tokens import Batch, TokenSpace


def check_rows(batch: Batch, space: TokenSpace, num_prompts: int) -> None:
    """Check responses that come from a file.

    Raises:
        ValueError: what no response of an EBM is.
    """
    columns = (batch.tokens, batch.lengths, batch.prompt_ids)
    if any(x.dtype != torch.int64 for x in columns) or not batch.rewards().is_floating_point():
        raise ValueError("kept responses are not integers, with rewards that are floats")
    if not batch.prompt_ids.shape == batch.rewards().shape == (len(batch),):
        raise ValueError("kept responses have not one prompt and one reward each")
    space.check(batch.tokens, batch.lengths)
    ids = batch.prompt_ids
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < num_prompts):
        raise ValueError(f"prompt_ids of kept responses must be in [0, {num_prompts})")


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
        """Rows of :meth:`state_dict`.

        Raises:
            ValueError: more rows than there is room for, or columns of several lengths.
        """
        size, lengths = state["size"], {len(column) for column in state["columns"]}
        if lengths != {size} or size > self.capacity or not 0 <= state["next"] < self.capacity:
            raise ValueError(
                f"{size} replayed rows, columns of {sorted(lengths)} rows, the next at "
                f"{state['next']}: the replay has room for {self.capacity}"
            )
        self.size, self.next = state["size"], state["next"]
        for kept, column in zip(columns(self.rows), state["columns"], strict=True):
            kept[: self.size] = column


def columns(batch: Batch) -> list[Tensor]:
    """The four tensors of scored responses, the same memory."""
    return [batch.tokens, batch.lengths, batch.prompt_ids, batch.rewards()]
