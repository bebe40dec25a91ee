"""Products of machines, of the states that can be reached, and minimal ones where it is cheap."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata.machine import Machine

MAX_STATES = 2**22
"""deterministic states of a product, at most"""
CHEAP = 2**22
"""transitions, rounds counted, up to which a product is made minimal"""
_BLOCK = 2**24


class Product(NamedTuple):
    """A product, and the deterministic state of each factor in each of its states."""

    machine: Machine
    left: Int64[Tensor, "K"]
    right: Int64[Tensor, "K"]


def product(a: Machine, b: Machine, most: int | None = None) -> Product:
    """The machine whose log-weight is the sum of two.

    Args:
        most: transitions that it may have; None for any number that :data:`MAX_STATES` allows.

    Raises:
        ValueError: factors for different numbers of prompts, or too many states.
    """
    for x, y in ((a.start, b.start), (a.log_initial, b.log_initial)):
        if 1 != len(x) != len(y) != 1:
            raise ValueError(f"one machine is for {len(x)} prompts, the other for {len(y)}")
    if a.vocab_size != b.vocab_size:
        raise ValueError(f"one machine reads {a.vocab_size} tokens, the other {b.vocab_size}")
    width = b.num_states
    starts = a.start * width + b.start
    limit = MAX_STATES if most is None else min(MAX_STATES, most // a.vocab_size)
    keys = _reachable(a, b, torch.unique(starts), limit)
    left, right = keys // width, keys % width
    next_ = torch.empty(len(keys), a.vocab_size, dtype=torch.int32, device=a.device)
    log_weight = torch.empty(next_.shape, dtype=torch.float64, device=a.device)
    step = max(1, _BLOCK // a.vocab_size)
    for i in range(0, len(keys), step):
        rows = slice(i, i + step)
        target, weight = _edges(a, b, keys[rows])
        place = torch.searchsorted(keys, target)
        # Where the weight is -inf nothing is reached, and any state will do.
        next_[rows] = place.masked_fill(torch.isneginf(weight), 0).to(torch.int32)
        log_weight[rows] = weight
    h = a.num_hidden * b.num_hidden
    pairs = (a.log_transition[:, None, :, None] + b.log_transition[None, :, None, :]).view(h, h)
    machine = Machine(
        next=next_,
        log_weight=log_weight,
        final=a.final[left] + b.final[right],
        start=torch.searchsorted(keys, starts),
        log_initial=(a.log_initial[:, :, None] + b.log_initial[:, None, :]).flatten(1),
        log_transition=pairs,
        log_emission=(a.log_emission[:, None] + b.log_emission[None]).flatten(0, 1),
        log_end=(a.log_end[:, None] + b.log_end).flatten(),
    )
    return Product(machine, left, right)


def _edges(a: Machine, b: Machine, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Targets (as keys) and log-weights of all transitions of some pairs of states."""
    left, right = keys // b.num_states, keys % b.num_states
    weight = a.log_weight[left] + b.log_weight[right]
    return a.next[left].long() * b.num_states + b.next[right], weight


def _reachable(a: Machine, b: Machine, keys: Tensor, most: int) -> Tensor:
    """Keys of all pairs that can be reached from some, sorted."""
    known = frontier = keys
    step = max(1, _BLOCK // a.vocab_size)
    while len(frontier):
        found = []
        for part in frontier.split(step):
            target, weight = _edges(a, b, part)
            found.append(torch.unique(target[~torch.isneginf(weight)]))
        frontier = torch.unique(torch.cat(found))
        frontier = frontier[~torch.isin(frontier, known)]
        known = torch.cat([known, frontier]).sort().values
        if len(known) > most:
            raise ValueError(
                f"the product of two automata has more than {most:,} states: use fewer or "
                "shorter conditions"
            )
    return known


def minimise(machine: Machine) -> Machine:
    """An equal machine with fewer deterministic states, by refining partitions (Moore 1956).

    States are merged where their weights are equal, bit for bit, whatever follows; it stops, and
    gives back the machine as it is, where that would take more than :data:`CHEAP`.
    """
    k, a = machine.next.shape
    if k == 1 or k * a > CHEAP:
        return machine
    # -0.0 and 0.0 are one weight.
    weight = (machine.log_weight + 0.0).cpu().numpy()
    next_ = machine.next.cpu().numpy().astype(np.int64)
    columns = np.concatenate([weight.view(np.int64), next_]).T
    _, first = np.unique(_rows(columns), return_index=True)
    weight, next_ = weight[:, first], next_[:, first]
    outside = np.concatenate([weight, (machine.final.cpu().numpy() + 0.0)[:, None]], axis=1)
    _, block = np.unique(_rows(outside.view(np.int64)), return_inverse=True)
    # What a transition of weight -inf leads to makes no difference.
    dead = np.isneginf(weight)
    count, work = int(block.max()) + 1, 0
    while True:
        work += next_.size
        if work > CHEAP:
            return machine
        after = np.where(dead, -1, block[next_])
        signature = np.concatenate([block[:, None], after], axis=1)
        _, block = np.unique(_rows(signature), return_inverse=True)
        if int(block.max()) + 1 == count:
            break
        count = int(block.max()) + 1
    if count == k:
        return machine
    _, keep = np.unique(block, return_index=True)
    device = machine.device
    merged = torch.from_numpy(block).to(device)
    kept = torch.from_numpy(keep).to(device)
    return replace(
        machine,
        next=merged[machine.next[kept].long()].to(torch.int32),
        log_weight=machine.log_weight[kept],
        final=machine.final[kept],
        start=merged[machine.start],
    )


def _rows(x: np.ndarray) -> np.ndarray:
    """Each row of integers as one item that can be compared."""
    x = np.ascontiguousarray(x)
    return x.view(np.dtype((np.void, x.dtype.itemsize * x.shape[1])))[:, 0]


def row_sums(machine: Machine) -> Float[Tensor, "K H"]:
    """log of the weights of all tokens and next states together; 0 where a state is a law.

    The sum over tokens of a product is taken as one: both parts at each pair of states.
    """
    leave = torch.logsumexp(machine.log_transition, 1)
    rows = max(1, _BLOCK // machine.log_emission.numel())
    parts = [
        torch.logsumexp(machine.log_emission + weight[:, None], 2)
        for weight in machine.log_weight.split(rows)
    ]
    return torch.cat(parts) + leave
