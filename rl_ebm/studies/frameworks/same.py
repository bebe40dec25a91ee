"""Rows that are one loss under several names: audited once.

Half of the options of a framework change nothing where it draws from the policy that it trains.
Two losses are the same here whose gradients are, up to one positive factor, at random log pi of
three sizes: near the reference, far from it, and where clamps cut. What else they are given are
responses of the EBM, with their lengths and their log p_ref, for nothing else is ever asked: where
every response has one log p_ref, a loss of pairs without a reference is often one with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Row
from rl_ebm.studies.losses.preference import Pairs, takes_lengths
from rl_ebm.studies.losses.responses import Responses

SIZES = (0.3, 3.0, 12.0)
"""of log-probabilities and logits"""
BATCH = 48
CLOSE = 1e-9
"""relative difference of each entry that rounding may make"""


@dataclass
class Seen:
    """Rows that were audited, and what was found of each."""

    responses: tuple[Responses, ...]
    """of each prompt"""
    known: list[tuple[Row, Tensor, dict[str, Any]]] = field(default_factory=list)

    def find(self, row: Row) -> dict[str, Any] | None:
        """What is known of a loss that is the same; None where there is none."""
        mine = fingerprint(row, self.responses)
        for other, theirs, found in self.known:
            asked, known = (
                (x.kind, x.advantages, x.sampler, x.pairs or Pairs()) for x in (row, other)
            )
            if asked == known and alike(mine, theirs):
                return found
        return None

    def keep(self, row: Row, found: dict[str, Any]) -> None:
        """Remember a row."""
        self.known.append((row, fingerprint(row, self.responses), found))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients are one, up to a positive factor."""
    if a.shape != b.shape or not len(a) or not bool(b.any()):
        return False
    at = int(b.abs().argmax())
    factor = a[at] / b[at]
    return bool(factor > 0) and torch.allclose(a, factor * b, rtol=CLOSE, atol=0.0)


def fingerprint(row: Row, responses: Sequence[Responses]) -> Tensor:
    """The gradients of a loss at the inputs of every size, one after another; empty if it fails."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in SIZES:
        leaves, inputs = _inputs(row, responses, size, generator)
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
    row: Row, responses: Sequence[Responses], size: float, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """What has a gradient, and the rest, of responses of every length."""

    def noise(*shape: int) -> Tensor:
        return size * torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    tokens, mask, log_ref = _some(responses, generator)
    if row.kind == "preference":
        chosen, rejected = (-noise().abs() - 0.01 for _ in range(2))
        whole = log_ref.sum(1)
        rest = [whole, whole.roll(1)]
        if takes_lengths(row.loss):
            rest += [mask.sum(1), mask.sum(1).roll(1)]
        return [chosen.requires_grad_(), rejected.requires_grad_()], rest
    width = mask.shape[1]
    if row.kind == "distillation":
        a = responses[0].space.vocab_size
        student, teacher = noise(width, a), noise(width, a)
        return [student.requires_grad_()], [teacher, tokens, mask]
    log_pi = (-noise(width).abs() - 0.01).masked_fill(~mask, 0.0)
    advantages = noise(1).expand(mask.shape).masked_fill(~mask, 0.0)
    return [log_pi.clone().requires_grad_()], [log_pi, log_ref, advantages, mask]


def _some(
    responses: Sequence[Responses], generator: torch.Generator
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Tokens, where they are, and log p_ref, of as many responses of each length as there are."""
    known = responses[0].mask.sum(1).unique().tolist()
    rows = []
    for i in range(BATCH):
        of = responses[i % len(responses)]
        alike = (of.mask.sum(1) == known[i % len(known)]).nonzero()[:, 0]
        alike = alike if len(alike) else torch.arange(len(of.tokens))
        at = alike[torch.randint(len(alike), (1,), generator=generator)]
        rows.append((of.tokens[at], of.mask[at], of.log_ref[at]))
    tokens, mask, log_ref = (torch.cat(x) for x in zip(*rows, strict=True))
    return tokens, mask, log_ref
