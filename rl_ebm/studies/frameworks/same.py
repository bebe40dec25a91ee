"""Rows that are one loss under several names: audited once.

Half of the options of a framework change nothing where it draws from the policy that it trains.
Two losses are the same here whose gradients are, up to one positive factor, at random inputs of
three sizes: near the reference, far from it, and where clamps cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Row
from rl_ebm.studies.losses.preference import Pairs, takes_lengths
from rl_ebm.tokens import TokenSpace, length_mask

SIZES = (0.3, 3.0, 12.0)
"""of log-probabilities and logits"""
BATCH = 48
CLOSE = 1e-9
"""relative difference of each entry that rounding may make"""


@dataclass
class Seen:
    """Rows that were audited, and what was found of each."""

    space: TokenSpace
    known: list[tuple[Row, Tensor, dict[str, Any]]] = field(default_factory=list)

    def find(self, row: Row) -> dict[str, Any] | None:
        """What is known of a loss that is the same; None where there is none."""
        mine = fingerprint(row, self.space)
        for other, theirs, found in self.known:
            asked, known = (
                (x.kind, x.advantages, x.sampler, x.pairs or Pairs()) for x in (row, other)
            )
            if asked == known and alike(mine, theirs):
                return found
        return None

    def keep(self, row: Row, found: dict[str, Any]) -> None:
        """Remember a row."""
        self.known.append((row, fingerprint(row, self.space), found))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients are one, up to a positive factor."""
    if a.shape != b.shape or not len(a) or not bool(b.any()):
        return False
    at = int(b.abs().argmax())
    factor = a[at] / b[at]
    return bool(factor > 0) and torch.allclose(a, factor * b, rtol=CLOSE, atol=0.0)


def fingerprint(row: Row, space: TokenSpace) -> Tensor:
    """The gradients of a loss at the inputs of every size, one after another; empty if it fails."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in SIZES:
        leaves, inputs = _inputs(row, space, size, generator)
        try:
            value = row.loss(*(x * 1 for x in leaves), *inputs)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        except Exception:  # the audit says what it is
            return torch.empty(0, dtype=torch.float64)
        found += [
            torch.zeros_like(x).flatten() if g is None else g.flatten()
            for x, g in zip(leaves, gradients, strict=True)
        ]
    return torch.cat(found)


def _inputs(
    row: Row, space: TokenSpace, size: float, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """What has a gradient, and the rest, of random responses of every length."""

    def noise(*shape: int) -> Tensor:
        return size * torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    length = space.max_length
    lengths = torch.full((BATCH,), length)
    if space.eos_id is not None:
        lengths = torch.arange(BATCH) % length + 1
    mask = length_mask(lengths, length)
    if row.kind == "preference":
        chosen, rejected, *rest = (-noise().abs() - 0.01 for _ in range(4))
        if takes_lengths(row.loss):
            rest += [lengths, lengths.roll(1)]
        return [chosen.requires_grad_(), rejected.requires_grad_()], rest
    if row.kind == "distillation":
        student, teacher = noise(length, space.vocab_size), noise(length, space.vocab_size)
        tokens = torch.randint(
            space.vocab_size, mask.shape, generator=generator, dtype=torch.long
        ).masked_fill(~mask, 0)
        return [student.requires_grad_()], [teacher, tokens, mask]
    log_pi, log_ref = ((-noise(length).abs() - 0.01).masked_fill(~mask, 0.0) for _ in range(2))
    advantages = noise(1).expand(mask.shape).masked_fill(~mask, 0.0)
    return [log_pi.clone().requires_grad_()], [log_pi, log_ref, advantages, mask]
