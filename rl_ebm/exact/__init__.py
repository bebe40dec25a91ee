"""Exact solutions of an EBM; each is itself a policy."""

from rl_ebm.exact.automaton import AutomatonSolution, summarise_automaton
from rl_ebm.exact.base import LISTED, Solution, is_solution, lists
from rl_ebm.exact.dispatch import TooLargeError, check_memory, find_machines, solve
from rl_ebm.exact.figures import Response, Summary
from rl_ebm.exact.summary import summarise
from rl_ebm.exact.tree import TreeSolution

__all__ = [
    "LISTED",
    "AutomatonSolution",
    "Response",
    "Solution",
    "Summary",
    "TooLargeError",
    "TreeSolution",
    "check_memory",
    "find_machines",
    "is_solution",
    "lists",
    "solve",
    "summarise",
    "summarise_automaton",
]
