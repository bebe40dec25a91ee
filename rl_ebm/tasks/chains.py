"""Rewards of neighbours: tasks that are solved exactly at sizes that nobody can list."""

from __future__ import annotations

import numpy as np
import torch

from rl_ebm.rewards.automaton import Automaton
from rl_ebm.tokens import TokenSpace

SCALE = 1.5
"""standard deviation of a coupling, reward units"""


def potts(space: TokenSpace, task_seed: int) -> Automaton:
    """R(y) = h[y_1] + sum_t J[y_t, y_(t+1)], h and J of 1.5 N(0, 1), J the same everywhere.

    h is drawn first. In EOS mode the EOS is a token of its response like any other.
    """
    a, t = space.vocab_size, space.max_length
    rng = np.random.default_rng(task_seed)
    first, coupling = (
        SCALE * torch.from_numpy(rng.standard_normal(shape)) for shape in ((a,), (a, a))
    )
    fields = torch.cat([first[None], torch.zeros(t - 1, a, dtype=torch.float64)])
    return Automaton.chain(space, fields, coupling.expand(t - 1, a, a) if t > 1 else None)
