"""Rewards of automata as arrays, for libraries that compile their rewards themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_ebm import EBM
from rl_ebm.exact import find_machines


@dataclass(frozen=True)
class Table:
    """A deterministic automaton: state 0 comes first.

    Attributes:
        next_state: the state after each, (K, A) int32.
        log_weight: what a transition adds, (K, A), nats.
        final: what the end in a state adds, (K,), nats.
    """

    next_state: np.ndarray
    log_weight: np.ndarray
    final: np.ndarray


def tables(ebm: EBM) -> list[Table]:
    """Automata whose sum is the log-weight of every response: log_ref, and R / beta.

    Raises:
        ValueError: an EBM that is no sum of deterministic automata, or that has prompts.
    """
    machines = [m for m in find_machines(ebm) or () if m is not None]
    if not machines or any(m.num_hidden > 1 or m.num_prompts > 1 for m in machines):
        raise ValueError("this library has rewards that are listed, or paid by an automaton")
    found = []
    for machine in machines:
        # The start in the place of state 0.
        order = np.arange(machine.num_states)
        order[[0, int(machine.start[0])]] = order[[int(machine.start[0]), 0]]
        found.append(
            Table(
                order[machine.next.numpy()[order]].astype(np.int32),
                machine.log_weight.numpy()[order],
                machine.final.numpy()[order],
            )
        )
    return found


def log_weights(tokens: Any, found: list[Table], arrays: Any = np) -> Any:
    """Log-weights of whole responses of one length, (..., T) ids to (...) nats.

    Args:
        arrays: NumPy, or what has its ``asarray``: JAX's.
    """
    total = 0.0
    for table in found:
        steps, weights, final = map(
            arrays.asarray, (table.next_state, table.log_weight, table.final)
        )
        state = tokens[..., 0] * 0
        for t in range(tokens.shape[-1]):
            total = total + weights[state, tokens[..., t]]
            state = steps[state, tokens[..., t]]
        total = total + final[state]
    return total
