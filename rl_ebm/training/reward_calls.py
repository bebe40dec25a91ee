"""Calls of a user's reward that solving took: counted apart from those of training."""

from __future__ import annotations

from rl_ebm.exact import Solution
from rl_ebm.rewards.base import is_called


def calls_of(solution: Solution | None) -> int:
    """Responses that the user's reward was called on to find a solution."""
    if solution is None or not solution.lists_all or not is_called(solution.ebm.reward_model):
        return 0
    return solution.ebm.num_prompts * solution.space.num_sequences
