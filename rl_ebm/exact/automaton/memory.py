"""What solving an EBM by its automata takes, told before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass

from rl_ebm.automata import Machine

_SLACK = 1.15
"""what the allocator keeps beside the tensors"""
_PRODUCT_BLOCK = 2**24
_EDGE_BLOCK = 2**23
_DENSE = 2**26


@dataclass(frozen=True)
class Need:
    """Sizes of a product, at most, and the bytes of the step that takes most.

    Attributes:
        states: pairs of a deterministic and a hidden state.
        bytes: beside what reward and reference hold already.
    """

    states: int
    bytes: int


def need(reference: Machine | None, reward: Machine, length: int) -> Need:
    """Bytes of :func:`automaton_values.find_values`, tensor by tensor, at its peak.

    Args:
        reference: of p_ref; None for the counting measure.
        length: T.
    """
    k, h, a = reward.num_states, reward.num_hidden, reward.vocab_size
    if reference is not None:
        k, h = k * reference.num_states, h * reference.num_hidden
    cells, edges = k * a, min(k * a, k * k)
    # Kept: transitions and weights; emissions of the product, and scaled; both of EOS's weights.
    base = 12 * cells + 16 * h * a + 8 * h * h + 16 * h * k
    values = 8 * (2 * length + 1) * h * k
    of_token = 8 * cells
    kept_edges = 16 * edges + 8 * h * edges
    # Two factors are put together, block by block.
    product = 0 if reference is None else 48 * min(cells, max(_PRODUCT_BLOCK, a))
    # Pairs of states are looked up in a square table, or sorted.
    lookup = 9 * k * k if k * k <= _DENSE else 40 * cells
    block = 24 * min(h * cells, max(_EDGE_BLOCK, h * a))
    block += 16 * min(cells, max(_EDGE_BLOCK // h, a))
    find = of_token + 8 * cells + lookup + 8 * edges + kept_edges + block
    # One step back in time, over all edges.
    step = of_token + kept_edges + values + 32 * h * edges + 48 * h * k
    return Need(k * h, int(_SLACK * (base + max(product, find, step))))
