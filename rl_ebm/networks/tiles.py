"""Groups of a prefix tree's nodes that attend together: dense little attentions, few gathers.

Below one anchor, the nodes of a few levels form a tile. All of them see what is above the
anchor, and among themselves their ancestors. Evaluated node by node, every node would gather
its own keys; a tile gathers those above it once.

Why not level by level: a level of B^t nodes would attend to t keys each, all gathered anew, and
gathering is memory traffic where attention is arithmetic. Why not all at once: of a dense N x N
attention over a tree almost everything is masked. A tile is the size between, where a masked entry
costs less than a gathered one; the three constants below are where they were found even on a CPU.
A tile changes the order of summation and nothing else: logits agree with those of plain sequences
up to rounding, and ``order`` and ``place`` must be applied wherever nodes meet their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

TOP = 128
"""most nodes of the first tile, the only one of its shape"""
SEVERAL_LEVELS = 32
"""most nodes of a tile of more than one level: wider ones attend mostly to what is masked"""
ONE_LEVEL = 64
"""most nodes of a tile of one level; wider levels attend node by node"""


class Tile(NamedTuple):
    """G groups of n nodes, of the same shape."""

    nodes: Int64[Tensor, "G n"]
    above: Int64[Tensor, "G W"]
    """the nodes above each group; the root is left out, for it is above all"""
    seen: Bool[Tensor, "n n"]
    """which of its group a node sees: its ancestors there, and itself"""


class Layout(NamedTuple):
    """All nodes in the order in which they attend: the root, then tile by tile.

    The first tile is one group, of the levels at the top.
    """

    order: Int64[Tensor, "N"]
    """the node at each place"""
    place: Int64[Tensor, "N"]
    """the place of each node"""
    tiles: list[Tile]
    """with places, not nodes, in ``above``"""


def layout(
    ancestors: Int64[Tensor, "N D"], depth: Int64[Tensor, "N"], branching: int, regular_from: int
) -> Layout:
    """The tiles of a tree: every node but the root is in one, after those above it.

    Args:
        ancestors, depth: as in :class:`rl_ebm.networks.prefix_tree.PrefixTree`.
        branching: how many children every node has that is ``regular_from`` deep or deeper;
            levels are in the order of their parents there.
    """
    depths = ancestors.shape[1]
    levels = [(depth == t).nonzero()[:, 0] for t in range(depths)]
    tiles = _tiles(ancestors, levels, branching, regular_from)
    order = torch.cat([levels[0], *(tile.nodes.flatten() for tile in tiles)])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return Layout(order, place, [tile._replace(above=place[tile.above]) for tile in tiles])


def _tiles(
    ancestors: Tensor, levels: Sequence[Tensor], branching: int, regular_from: int
) -> list[Tile]:
    depths, top = len(levels), 1
    while top < depths and sum(map(len, levels[1 : top + 1])) <= TOP:
        top += 1
    nodes = torch.cat([levels[0][:0], *levels[1:top]])
    seen = (ancestors[nodes, :, None] == nodes).any(1)
    found = [Tile(nodes[None], ancestors[:1, :0], seen)]
    regular = depths if branching > ONE_LEVEL else min(max(regular_from + 1, top), depths)
    alone = torch.ones(1, 1, dtype=torch.bool, device=ancestors.device)
    found += [
        Tile(levels[t][:, None], ancestors[levels[t], 1:t], alone) for t in range(top, regular)
    ]
    if regular == depths:
        return found
    height = 1
    while sum(branching**k for k in range(1, height + 2)) <= SEVERAL_LEVELS:
        height += 1
    # The lowest tiles are the tallest: most nodes are there.
    starts = sorted(max(stop - height, regular) for stop in range(depths, regular, -height))
    for start, stop in zip(starts, [*starts[1:], depths], strict=False):
        anchors = levels[start - 1]
        rows = [levels[t].view(len(anchors), -1) for t in range(start, stop)]
        seen = _family(branching, stop - start).to(ancestors.device)
        found.append(Tile(torch.cat(rows, 1), ancestors[anchors, 1:start], seen))
    return found


@lru_cache(maxsize=64)
def _family(branching: int, height: int) -> Bool[Tensor, "n n"]:
    """Ancestor-or-self among all nodes of ``height`` levels below one anchor."""
    levels = [(k, i) for k in range(1, height + 1) for i in range(branching**k)]
    return torch.tensor(
        [[j <= k and i // branching ** (k - j) == m for j, m in levels] for k, i in levels]
    )
