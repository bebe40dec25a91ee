"""What a reward is, and what it may have besides: every member that the library asks for.

What is optional makes work faster or tells what is known, and must agree with the calls of the
reward. It stands in :class:`FullReward`, once; the functions below are the only readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rl_ebm.automata import Machine
from rl_ebm.tokens import TokenSpace

Prompts = Sequence[Sequence[int]]


@runtime_checkable
class Reward(Protocol):
    """R(x, y) for a space; ``forbids`` says whether some R is known to be ``-inf``."""

    forbids: bool

    def __call__(self, tokens: Tensor, lengths: Tensor, prompt_ids: Tensor) -> Tensor:
        """R of complete responses, (B,), in reward units; NaN and +inf are errors.

        Args:
            tokens: (B, T) int64, 0 past the end of each.
            lengths: (B,) int64, EOS included.
            prompt_ids: (B,) int64, 0 everywhere without prompts.
        """
        ...

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Reward:
        """Check that the reward fits, before any work; return the reward to use."""
        ...

    def to(self, device: torch.device | str) -> Reward:
        """The same reward on another device."""
        ...


class FullReward(Reward, Protocol):
    """A reward with all that one may have. None of it is needed, and each is used where it is."""

    @property
    def scores(self) -> Tensor | None:
        """R of every response in enumeration order, (P, N): then no response is asked for."""

    @property
    def machine(self) -> Machine | None:
        """The automaton that pays R, in reward units: what makes EBMs solvable at any size."""

    def limits(self, space: TokenSpace, prompt: int) -> tuple[float, float]:
        """(least, largest) R of a prompt's responses, ``-inf`` included; infinite: not known."""
        ...

    @property
    def device(self) -> torch.device | str | None:
        """Where it takes tokens; None: wherever they are, so where the reference is. Absent: CPU.

        Of a module its weights' goes first.
        """

    @property
    def called(self) -> bool:
        """Whether each response costs a call that is the user's, and counted. Absent: yes."""
        ...


def scores_of(reward: object) -> Tensor | None:
    """R of every response; None where they are not listed."""
    scores: Tensor | None = getattr(reward, "scores", None)
    return scores


def machine_of(reward: object) -> Machine | None:
    """The automaton of a reward; None where it has none."""
    machine: Machine | None = getattr(reward, "machine", None)
    return machine


def limits_of(reward: object, space: TokenSpace, prompt: int = 0) -> tuple[float, float]:
    """(least, largest) R of a prompt's responses; infinite where not known."""
    own: Any = getattr(reward, "limits", None)
    if own is None:
        return -math.inf, math.inf
    least, largest = own(space, prompt)
    return float(least), float(largest)


def is_anywhere(reward: object) -> bool:
    """Whether a reward takes tokens on any device: its ``device`` is None."""
    return getattr(reward, "device", "") is None


def is_called(reward: object) -> bool:
    """Whether each response costs a call of the user's: a function, a network, a class."""
    return bool(getattr(reward, "called", True))
