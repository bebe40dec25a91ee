"""Exact solutions of an EBM; each is itself a policy."""

from rl_ebm.exact.problems import forbids, problems
from rl_ebm.exact.solution import TreeSolution
from rl_ebm.exact.solve import TooLargeError, check_memory, solve
from rl_ebm.exact.summary import Response, Summary, summarise

__all__ = [
    "Response",
    "Summary",
    "TooLargeError",
    "TreeSolution",
    "check_memory",
    "forbids",
    "problems",
    "solve",
    "summarise",
]
