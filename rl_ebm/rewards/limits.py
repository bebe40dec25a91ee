"""The least and the largest number that a machine pays, where they are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rl_ebm.automata import Machine
from rl_ebm.tokens import TokenSpace

_MOST_STATES = 1024
"""K^2 numbers are kept"""


def machine_limits(machine: Machine, space: TokenSpace, prompt: int = 0) -> tuple[float, float]:
    """(least, largest) weight of all responses, by dynamic programming over the states.

    Infinite where not known: of a machine with a hidden part, or with many states.
    """
    if machine.num_hidden > 1 or machine.num_states > _MOST_STATES:
        return -math.inf, math.inf
    start = int(machine.begin(torch.tensor([prompt], device=machine.device)).k)
    first, second = (_best(machine, space, sign)[start] for sign in (-1.0, 1.0))
    return -float(first), float(second)


def _best(machine: Machine, space: TokenSpace, sign: float) -> Tensor:
    """The largest sign * R of the responses that begin in each state, (K,)."""
    k = machine.num_states
    weight, into = sign * machine.log_weight, machine.next.long()
    final = sign * machine.final
    best = torch.full((k,), -math.inf, dtype=torch.float64, device=weight.device)
    ends = weight + final[into]
    edges = weight
    if space.eos_id is not None:
        stops = ends[:, space.eos_id]
        edges = weight.clone()
        edges[:, space.eos_id] = -math.inf
    else:
        stops = ends.amax(1)
    joined = best[:, None].repeat(1, k).scatter_reduce_(1, into, edges, "amax")
    best = stops
    for _ in range(space.max_length - 1):
        # -inf marks a missing edge, also where -R = +inf follows it.
        further = (joined + best).masked_fill(torch.isneginf(joined), -math.inf).amax(1)
        best = further if space.eos_id is None else torch.maximum(further, stops)
    return best
