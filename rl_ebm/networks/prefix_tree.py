"""Prefix trees: many prefixes that share their beginnings, each of them listed once.

A network that evaluates a tree does ``sum_t branching**t`` prefixes instead of
``T * branching**T`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from rl_ebm.networks.tiles import Layout, layout
from rl_ebm.tokens import TokenSpace


@dataclass(frozen=True)
class PrefixTree:
    """Prefixes by level. Node 0 is the empty prefix; parents stand before their children.

    Args:
        tokens: last token of each prefix, (N,); that of node 0 is not read.
        ancestors: nodes from the root to the prefix itself, (N, depth + 1 at most); past the
            prefix's own depth it repeats the prefix.
        depth: number of tokens of each prefix, (N,).
        max_length: T of the space, for policies that take whole sequences only.
        branching, regular_from: every node that is ``regular_from`` deep or deeper, but for the
            deepest, has ``branching`` children, in the order of their parents; 0 for no node.
    """

    tokens: Int64[Tensor, "N"]
    ancestors: Int64[Tensor, "N D"]
    depth: Int64[Tensor, "N"]
    max_length: int
    branching: int = 0
    regular_from: int = 2**31

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @staticmethod
    def full(space: TokenSpace, device: str = "cpu") -> PrefixTree:
        """All states of a space, numbered as :meth:`TokenSpace.state_ids` does. Cached."""
        return _full(space, device)

    @staticmethod
    def below(
        space: TokenSpace, depth: int, start: int, stop: int, end: int, device: str = "cpu"
    ) -> tuple[PrefixTree, list[slice]]:
        """Prefixes ``start`` to ``stop`` of one depth, their descendants, their ancestors.

        Args:
            end: the first depth that is left out.

        Returns:
            The tree, and for each depth from ``depth`` to ``end - 1`` where its nodes stand;
            within a slice they are in enumeration order.
        """
        tokens = [torch.zeros(1, dtype=torch.int64, device=device)]
        ancestors = [torch.zeros(1, 1, dtype=torch.int64, device=device)]
        depths = [0]
        slices = [slice(0, 1)] if depth == 0 else []
        first, count, low = 0, 1, 0
        for t in range(1, end):
            if t <= depth:
                # The range of ancestors at depth t of the block that was asked for.
                scale = space.branching ** (depth - t)
                a, b = start // scale, (stop - 1) // scale + 1
            else:
                scale = space.branching ** (t - depth)
                a, b = start * scale, stop * scale
            index = torch.arange(a, b, device=device)
            parent = first + index // space.branching - low
            node = torch.arange(first + count, first + count + len(index), device=device)
            path = ancestors[-1][parent - first]
            tokens.append(space.unrank(index % space.branching))
            ancestors.append(torch.cat([path, node[:, None]], dim=1))
            depths.append(t)
            first, count, low = first + count, len(index), a
            if t >= depth:
                slices.append(slice(first, first + count))
        width = len(ancestors)
        padded = [
            torch.cat([path, path[:, -1:].expand(-1, width - path.shape[1])], dim=1)
            for path in ancestors
        ]
        depth_of = [
            torch.full((len(p),), t, device=device) for p, t in zip(padded, depths, strict=True)
        ]
        tree = PrefixTree(
            torch.cat(tokens),
            torch.cat(padded),
            torch.cat(depth_of),
            space.max_length,
            space.branching,
            depth,
        )
        return tree, slices

    @cached_property
    def layout(self) -> Layout:
        """The nodes in the order in which a network attends among them."""
        return layout(self.ancestors, self.depth, self.branching, self.regular_from)

    @cached_property
    def parents(self) -> Int64[Tensor, "N"]:
        """The node before each; node 0 stands before itself."""
        return self.ancestors.gather(1, (self.depth - 1).clamp(min=0)[:, None])[:, 0]

    @cached_property
    def is_leaf(self) -> Bool[Tensor, "N"]:
        leaf = torch.ones(len(self), dtype=torch.bool, device=self.tokens.device)
        leaf[self.parents[1:]] = False
        return leaf

    @cached_property
    def leaf_depth(self) -> Int64[Tensor, "M"]:
        return self.depth[self.is_leaf]

    @cached_property
    def leaf_tokens(self) -> Int64[Tensor, "M T"]:
        """Tokens of the leaves' prefixes, 0 where they have none."""
        paths = self.ancestors[self.is_leaf][:, 1:]
        tokens = self.tokens[paths]
        past = torch.arange(paths.shape[1], device=tokens.device) >= self.leaf_depth[:, None]
        tokens = tokens.masked_fill(past, 0)
        room = self.max_length - tokens.shape[1]
        return torch.cat([tokens, tokens.new_zeros(len(tokens), room)], dim=1)

    @cached_property
    def owner(self) -> tuple[Int64[Tensor, "N"], Int64[Tensor, "N"]]:
        """For each node a leaf below it, and the column of that leaf's sequence: its depth."""
        leaves = self.ancestors[self.is_leaf]
        owner = torch.empty(len(self), dtype=torch.int64, device=self.tokens.device)
        rows = torch.arange(len(leaves), device=owner.device)[:, None].expand_as(leaves)
        owner[leaves.flatten()] = rows.flatten()
        return owner, self.depth


@lru_cache(maxsize=8)
def _full(space: TokenSpace, device: str) -> PrefixTree:
    return PrefixTree.below(space, 0, 0, 1, space.max_length, device)[0]
