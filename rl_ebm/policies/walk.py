"""A policy's logits at every prefix of a space, block by block, in bounded memory.

The tree is cut into subtrees; inside one, every prefix is evaluated once, by level, and shares
the keys and values of its ancestors. ``sum_t branching**t`` evaluations, not ``T * A**T``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies.base import Policy, device_of, tree_bytes_per_node
from rl_ebm.policies.scoring import tree_logits
from rl_ebm.tokens import TokenSpace

DEFAULT_MEMORY = 2**28


class Block(NamedTuple):
    """Logits at the prefixes ``start`` to ``stop`` of one depth, in enumeration order."""

    depth: int
    start: int
    stop: int
    logits: Float[Tensor, "n A"]  # masked by the space, float64


@torch.no_grad()
def walk(
    policy: Policy, space: TokenSpace, prompt: int = 0, memory: int = DEFAULT_MEMORY
) -> Iterator[Block]:
    """All prefixes, depth first by blocks: a block's parents are in the last block above it.

    Args:
        prompt: which prompt.
        memory: about how many bytes one evaluation may take.
    """
    device = device_of(policy)
    max_nodes = max(space.vocab_size, memory // _bytes_per_node(policy, space))
    b, depths = space.branching, space.max_length
    prompt_ids = torch.tensor([prompt], device=device)
    forced = ~space.action_mask(device)
    stack = [(0, 0, 1)]
    while stack:
        depth, start, stop = stack.pop()
        end, width, total = depth + 1, stop - start, stop - start
        while end < depths and total + width * b <= max_nodes:
            width, end = width * b, end + 1
            total += width
        tree, slices = PrefixTree.below(space, depth, start, stop, end, str(device))
        logits = tree_logits(policy, tree, prompt_ids, space)[0]
        for t, nodes in enumerate(slices, start=depth):
            scale = b ** (t - depth)
            rows = logits[nodes].double().masked_fill(forced[t], -torch.inf)
            yield Block(t, start * scale, stop * scale, rows)
        if end < depths:
            # Pieces whose whole subtrees fit, where one does.
            below = space.state_offset(depths - end)
            piece = max(1, max_nodes // below)
            scale = b ** (end - depth)
            starts = range(start * scale, stop * scale, piece)
            stack += [(end, i, min(i + piece, stop * scale)) for i in reversed(starts)]


def prompts_at_once(policy: Policy, space: TokenSpace, memory: int) -> int:
    """How many prompts' whole trees may be evaluated together: 1 where one is too large already."""
    fit = memory // (4 * space.num_states * _bytes_per_node(policy, space))
    return min(max(1, fit), 2**31)


@torch.no_grad()
def walk_prompts(
    policy: Policy, space: TokenSpace, prompts: Int64[Tensor, "P"], memory: int = DEFAULT_MEMORY
) -> Iterator[Block]:
    """The same for some prompts at once, a whole depth at a time: rows of one after another's."""
    if len(prompts) == 1:
        yield from walk(policy, space, int(prompts[0]), memory)
        return
    device = device_of(policy)
    tree = PrefixTree.full(space, str(device))
    logits = tree_logits(policy, tree, prompts.to(device), space)
    forced = ~space.action_mask(device)
    for t in range(space.max_length):
        rows = logits[:, space.state_offset(t) : space.state_offset(t + 1)].flatten(0, 1)
        rows = rows.double().masked_fill(forced[t], -torch.inf)
        yield Block(t, 0, space.num_prefixes(t), rows)


def _bytes_per_node(policy: Policy, space: TokenSpace) -> int:
    return tree_bytes_per_node(policy) + 16 * space.vocab_size
