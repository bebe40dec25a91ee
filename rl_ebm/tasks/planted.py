"""Rewards with something planted in them: what benchmarks of exploration and planning ask for."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rl_ebm.tokens import TokenSpace

STAR_ARMS = 4
STAR_PROMPTS = [[arm] for arm in range(STAR_ARMS)]
"""of the task "star": the arm whose end is the goal"""
MAX_RESPONSES = 2**24
"""most responses that a planted task lists"""


def planted_modes(space: TokenSpace, task_seed: int, modes: int = 8) -> Float64[Tensor, "N"]:
    """R(y) = -2 times the Hamming distance to the nearest of some random responses.

    The modes of bit sequences in Malkin et al. 2022 (arXiv 2201.13259), at a size that can be
    summed. Equal modes, far apart: a policy that finds one need not find the others.
    """
    tokens = _responses(space, "planted")
    rng = np.random.default_rng(task_seed)
    chosen = torch.from_numpy(rng.integers(0, space.vocab_size, (modes, space.max_length)))
    distance = (tokens[:, None] != chosen).sum(2).amin(1)
    return -2.0 * distance.double()


def lookahead(space: TokenSpace, task_seed: int, penalty: float = 8.0) -> Float64[Tensor, "N"]:
    """The first token decides what the last may be: a random set, of 1 to A - 1 tokens.

    All else is free; a last token that the first rules out costs ``penalty``. Whoever picks the
    first token must know how many ways it leaves open.
    """
    tokens = _responses(space, "lookahead")
    rng = np.random.default_rng(task_seed)
    a = space.vocab_size
    allowed = torch.zeros(a, a, dtype=torch.bool)
    for first in range(a):
        allowed[first, torch.from_numpy(rng.permutation(a)[: rng.integers(1, max(a, 2))])] = True
    return torch.where(allowed[tokens[:, 0], tokens[:, -1]], 0.0, -penalty).double()


def sparse(space: TokenSpace, task_seed: int, prize: float = 12.0) -> Float64[Tensor, "N"]:
    """One response in ten thousand pays, the others nothing."""
    tokens = _responses(space, "sparse")
    count = max(1, len(tokens) // 10_000)
    scores = torch.zeros(len(tokens), dtype=torch.float64)
    rng = np.random.default_rng(task_seed)
    scores[torch.from_numpy(rng.permutation(len(tokens))[:count])] = prize
    return scores


def star(space: TokenSpace, task_seed: int) -> Float64[Tensor, "P N"]:
    """A path on a star graph: the prompt names the arm that leads to the goal, 8 if it is taken.

    Nodes are tokens, in random places; an arm is a path of T of them. Another whole arm pays 2,
    anything else nothing. All is decided by the first step, and shown by the last (Bachmann and
    Nagarajan 2024, arXiv 2403.06963).

    Raises:
        ValueError: fewer tokens than the arms have nodes.
    """
    need = STAR_ARMS * space.max_length
    if space.vocab_size < need:
        raise ValueError(
            f"task 'star' has {STAR_ARMS} arms of max_length={space.max_length} nodes: it needs "
            f"vocab_size >= {need}, got {space.vocab_size}"
        )
    tokens = _responses(space, "star")
    nodes = np.random.default_rng(task_seed).permutation(space.vocab_size)[:need]
    arms = torch.from_numpy(nodes).view(STAR_ARMS, space.max_length)
    walked = (tokens[:, None] == arms).all(2)  # (N, arms)
    goal = torch.eye(STAR_ARMS, dtype=torch.float64) * 6.0 + 2.0
    return goal @ walked.T.double()


def _responses(space: TokenSpace, name: str) -> Tensor:
    if space.eos_id is not None:
        raise ValueError(f"task {name!r} has responses of fixed length: leave out eos_id")
    if space.num_sequences > MAX_RESPONSES:
        raise ValueError(
            f"task {name!r} lists its responses, at most 2**{int(math.log2(MAX_RESPONSES))}: take "
            "a smaller vocab_size or max_length"
        )
    tokens, _ = space.sequences()
    return tokens
