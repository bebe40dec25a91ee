"""Batches at the door: kinds and shapes, without reading a number."""

from __future__ import annotations

from rl_ebm.messages.arguments import ids_tensor, shown
from rl_ebm.tokens import Batch, TokenSpace


def check_batch(batch: object, space: TokenSpace, name: str = "batch") -> Batch:
    """A batch of responses of a space; their ids are not read.

    Raises:
        TypeError: no Batch, or one whose parts are no tensors of integers.
        ValueError: parts of other shapes.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"{name} must be an rl_ebm.Batch of responses, got {shown(batch)}")
    space.check_kind(batch.tokens)
    n = len(batch.tokens)
    for part in ("lengths", "prompt_ids"):
        ids = ids_tensor(part, getattr(batch, part), 1)
        if ids.shape != (n,):
            raise ValueError(f"{part} has shape {tuple(ids.shape)}, expected ({n},)")
    return batch
