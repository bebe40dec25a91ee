"""Sums of exponentials, in logs: products of matrices and sums by segment, exact at any range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SAFE = 1e-280
"""a scaled sum below it may have lost terms to underflow, and is done again in logs"""
AT_ONCE = 2**25
"""terms of sums that a device other than a CPU makes at once"""
_BLOCK = 2**22


@dataclass(frozen=True)
class Columns:
    """The right factor of a product: its logs, and each column scaled by its largest entry."""

    log: Float[Tensor, "k m"]
    top: Float[Tensor, "m"]
    scaled: Float[Tensor, "k m"]

    @classmethod
    def of(cls, log: Float[Tensor, "k m"]) -> Columns:
        top = finite(log.amax(0))
        return cls(log, top, (log - top).exp())

    def to(self, device: torch.device | str) -> Columns:
        return Columns(self.log.to(device), self.top.to(device), self.scaled.to(device))

    def pick(self, columns: Int64[Tensor, "p"]) -> Columns:
        """Some of them."""
        if len(columns) == len(self.top):
            return self
        return Columns(self.log[:, columns], self.top[columns], self.scaled[:, columns])


def log_matmul(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"] | Columns) -> Float[Tensor, "n m"]:
    """log of exp(a) @ exp(b), float64; ``-inf`` is a legal entry.

    Rows of a and columns of b are scaled by their maxima, so the terms of a sum that underflow
    are below 1e-308: where the sum is above :data:`SAFE` they do not count, and where it is not
    the entry is computed again by logsumexp.
    """
    b = b if isinstance(b, Columns) else Columns.of(b)
    if in_one(a.device, len(a), *b.log.shape):
        return torch.logsumexp(a[:, :, None] + b.log, 1)
    top = finite(a.amax(1, keepdim=True))
    total = (a - top).exp() @ b.scaled
    again = total.new_empty(0, 2, dtype=torch.int64)
    if total.numel() and bool(total.amin() < SAFE):
        # Where no term is there the sum is 0 for certain.
        terms = (~torch.isneginf(a)).to(a.dtype) @ (~torch.isneginf(b.log)).to(a.dtype)
        again = ((total < SAFE) & (terms > 0)).nonzero()
    out = total.log_().add_(top).add_(b.top)
    step = max(1, _BLOCK // max(1, a.shape[1]))
    for part in again.split(step):
        rows, columns = part.unbind(1)
        out[rows, columns] = torch.logsumexp(a[rows] + b.log[:, columns].T, 1)
    return out


def in_one(device: torch.device, *sizes: int) -> bool:
    """Whether sums of so many terms are made at once on a device: to ask what needs care waits.

    A CPU is asked: it does not wait, and the product of matrices is much less work.
    """
    return device.type != "cpu" and math.prod(sizes) <= AT_ONCE


def segment_logsumexp(
    x: Float[Tensor, "n m"], segment: Int64[Tensor, "m"], count: int
) -> Float[Tensor, "n count"]:
    """logsumexp over the columns of each segment; ``-inf`` for a segment without columns."""
    index = segment.expand(x.shape[0], -1)
    top = x.new_full((x.shape[0], count), -torch.inf).scatter_reduce_(1, index, x, "amax")
    top = finite(top)
    total = torch.zeros_like(top).index_add_(1, segment, (x - top.gather(1, index)).exp())
    return total.log() + top


def finite(top: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A maximum to subtract: 0 where it is ``-inf``."""
    return top.masked_fill(torch.isneginf(top), 0.0)
