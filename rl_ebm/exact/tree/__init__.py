"""The exact solution over the tree of all prefixes."""

from rl_ebm.exact.tree.solution import TreeSolution

__all__ = ["TreeSolution"]
