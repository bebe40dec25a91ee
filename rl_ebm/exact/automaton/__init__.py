"""The exact solution where the EBM is a product of automata: by states, never by sequences."""

from rl_ebm.exact.automaton.solution import AutomatonSolution
from rl_ebm.exact.automaton.summary import summarise_automaton

__all__ = ["AutomatonSolution", "summarise_automaton"]
