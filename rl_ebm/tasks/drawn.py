"""Rewards that list one score for each response, in enumeration order."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rl_ebm.messages.words import count_text
from rl_ebm.tokens import TokenSpace

MAX_SCORES = 2**26
"""most scores of a task: 512 MiB of float64"""
PROMPTS = [[0], [1, 0], []]
"""of the task "prompts": lengths 1, 2 and 0, ids of any vocabulary"""


def normal(space: TokenSpace, task_seed: int) -> Float64[Tensor, "N"]:
    """2 * N(0, 1), one for each response.

    Raises (as all here): ValueError, more than :data:`MAX_SCORES` scores.
    """
    return 2 * _draw(space, task_seed)[0]


def normal_of_prompts(space: TokenSpace, task_seed: int) -> Float64[Tensor, "P N"]:
    """2 * N(0, 1), one for each prompt and response."""
    return 2 * _draw(space, task_seed, len(PROMPTS))


def peaked(space: TokenSpace, task_seed: int, temperature: float = 0.1) -> Float64[Tensor, "N"]:
    """N(0, 1) / temperature: the law softmax(z / t) of arXiv 2512.15605, App. C and Fig. 5."""
    return _draw(space, task_seed)[0] / temperature


def zipf(space: TokenSpace, task_seed: int = 0) -> Float64[Tensor, "N"]:
    """-log of the rank, ranks in enumeration order: close sequences, close scores.

    The law of arXiv 2512.15605, Figs. 2 to 4, as far as its curves tell: it states neither the
    exponent nor the order. Nothing is drawn: every seed gives the same scores.
    """
    _check(space.num_sequences)
    return -torch.arange(1, space.num_sequences + 1).double().log()


def _draw(space: TokenSpace, task_seed: int, num_prompts: int = 1) -> Float64[Tensor, "P N"]:
    _check(num_prompts * space.num_sequences)
    rng = np.random.default_rng(task_seed)
    return torch.from_numpy(rng.standard_normal((num_prompts, space.num_sequences)))


def _check(count: int) -> None:
    if count > MAX_SCORES:
        raise ValueError(
            f"this task has one score for each response, {count_text(count)} here, and at most "
            f"{MAX_SCORES} fit: take a smaller vocab_size or max_length, or the task 'pairwise'"
        )
