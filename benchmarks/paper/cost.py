"""The price of the ARM's pass through the prefix tree, against one over all sequences."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.paper.common import Rows, select
from benchmarks.paper.fit import SIZES, make_arm
from rl_ebm import TokenSpace
from rl_ebm.policies.scoring import q_values, tree_q_values


@dataclass(frozen=True)
class Cost:
    """The ARM's pass through the prefix tree against one over all sequences."""

    vocab_size: int
    max_length: int
    layers: int
    repeat: int
    seed: int = 0


def measure_cost(job: Cost) -> Rows:
    """Seconds of a pass with its gradient, both ways, in turn."""
    space = TokenSpace(job.vocab_size, job.max_length)
    policy = make_arm(space, SIZES[job.layers], job.seed)
    tokens, _ = space.sequences()

    def by_tree() -> Tensor:
        return tree_q_values(policy, space).square().sum()

    class Sequences:
        """The same policy without its tree pass."""

        prompts, logits = None, staticmethod(policy.logits)

    sequences = Sequences()

    def by_sequence() -> Tensor:
        total = torch.zeros(())
        for part in tokens.split(8192):
            loss = q_values(sequences, space, part).square().sum()
            loss.backward()
            total += loss.detach()
        return total.requires_grad_()

    pairs = []
    for i in range(job.repeat + 1):
        times = []
        for f in (by_tree, by_sequence):
            start = time.perf_counter()
            f().backward()
            times.append(time.perf_counter() - start)
        if i:  # the first pair warms up
            pairs.append(times)
    tree, sequence = (statistics.median(x) for x in zip(*pairs, strict=True))
    return [{"model": "cost", "seconds": tree, "seconds_sequences": sequence}]


def cost_lines(rows: Rows) -> list[tuple[str, ...]]:
    """Lines of a table: milliseconds both ways, and their ratio."""
    return [
        (
            f"{r['vocab_size']}, {r['max_length']}, {r['layers']}",
            f"{float(r['seconds']) * 1e3:.3g} ms",
            f"{float(r['seconds_sequences']) * 1e3:.3g} ms",
            f"{float(r['seconds_sequences']) / float(r['seconds']):.1f} x",
        )
        for r in select(rows, model="cost")
    ]
