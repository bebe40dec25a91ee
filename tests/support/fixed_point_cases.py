"""Small EBMs with random references, and the penalties, for the tests of fixed points."""

from __future__ import annotations

import math
from itertools import product

import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.policies import Tabular
from rl_ebm.studies.problems import problems

PENALTIES = [
    (k, place, level)
    for place, k, level in product(("reward", "loss"), ("k1", "k2", "k3"), ("token", "sequence"))
]


def small_ebm(shape, beta=0.5, seed=0, forbid=False):
    """Random scores and a random reference; ``forbid`` takes one action of the root away."""
    space = rl_ebm.TokenSpace(*shape)
    reference = Tabular(space, scale=0.7, generator=seeded(seed), dtype=torch.float64)
    if forbid:
        with torch.no_grad():
            reference.table[0, 0, (space.eos_id or 0) - 1] = -math.inf
    weights = torch.randn(space.num_sequences, generator=seeded(seed + 1), dtype=torch.float64)
    if space.eos_id is None:
        return rl_ebm.EBM(space, weights, beta, reference)

    def reward(tokens, lengths):
        return weights[space.sequence_indices(tokens, lengths)]

    return rl_ebm.EBM(space, reward, beta, reference)


def problem_of(ebm):
    (problem,) = problems(rl_ebm.solve(ebm))
    return problem
