"""Whose calls a reward costs: those of training, and those of solving, counted apart."""

from __future__ import annotations

import torch

from rl_ebm.ebm import EBM
from rl_ebm.exact import Solution
from rl_ebm.rewards.function import Function
from rl_ebm.rewards.trl import TRLFunction


def is_called(ebm: EBM) -> bool:
    """Whether solving an EBM calls a reward of the user's: a function, a network, a class."""
    reward = ebm.reward_model
    theirs = not type(reward).__module__.startswith("rl_ebm.")
    return theirs or isinstance(reward, (Function, TRLFunction, torch.nn.Module))


def calls_of(solution: Solution | None) -> int:
    """Responses that the user's reward was called on to find a solution."""
    if solution is None or solution.mode != "exact-tree" or not is_called(solution.ebm):
        return 0
    return solution.ebm.num_prompts * solution.space.num_sequences
