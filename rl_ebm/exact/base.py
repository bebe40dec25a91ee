"""What every exact solution can do, whatever it was found by."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.exact.figures import Summary
from rl_ebm.policies.base import Policy
from rl_ebm.tokens import Batch, TokenSpace

LISTED = 2**24
"""logits of all prefixes, up to which those of an automaton's EBM are listed"""

Rows = slice | Tensor
"""Prefixes of one depth: a range, or an index for each row."""


class Solution(Policy, Protocol):
    """q* of an EBM: a policy whose logits are values, and by rows of a depth.

    Attributes:
        ebm: what was solved.
        log_z: log Z(x) of every prompt, (P,), float64, nats.
        mode: how it was found, for reports: "exact-tree" or "exact-automaton".
        lists_all: whether every prefix was looked at to find it, and is whenever it is compared.
        forbids: whether some action has q* = -inf where the space allows it.
        forbids_responses: whether a response that the reference allows has reward ``-inf``.
    """

    ebm: EBM
    space: TokenSpace
    log_z: Tensor
    mode: str
    lists_all: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def forbids(self) -> bool: ...

    @property
    def forbids_responses(self) -> bool: ...

    def q_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Tensor:
        """q* of some prefixes of one depth, (n, A) float64."""
        ...

    def reduced_q_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Tensor:
        """q* less a constant of each prefix: what its differences are taken from.

        Probabilities depend on differences alone, and next to a large R / beta they lose digits.
        """
        ...

    def log_ref_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Tensor:
        """log p_ref of some prefixes; 0 everywhere for the counting measure."""
        ...

    def r_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Tensor:
        """r of some prefixes: log p_ref, plus R / beta where an action ends the response."""
        ...

    def reward_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Tensor:
        """R of the response that ends with each action at some prefixes; 0 where none ends."""
        ...

    def summary(self, top: int = 10, prompt: int = 0) -> Summary | None:
        """Figures of a prompt that take no list of prefixes; None where a list is the way."""
        ...

    def log_prob(
        self, tokens: Tensor, lengths: Tensor | None = None, prompt_ids: Tensor | None = None
    ) -> Tensor: ...

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        prompt_ids: Tensor | None = None,
    ) -> Batch: ...


def is_solution(thing: object) -> bool:
    """Whether something is an exact solution: it has q* by rows, and the EBM that was solved."""
    return hasattr(thing, "q_rows") and isinstance(getattr(thing, "ebm", None), EBM)


def lists(solution: Solution) -> bool:
    """Whether all prefixes of a solution are looked at one by one: always those of a tree."""
    space = solution.space
    small = solution.ebm.num_prompts * space.num_states * space.vocab_size <= LISTED
    return small or solution.lists_all
