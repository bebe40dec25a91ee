"""What every reward can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rl_ebm.tokens import TokenSpace

Prompts = Sequence[Sequence[int]]


@runtime_checkable
class Reward(Protocol):
    """R(x, y) for a space; ``forbids`` says whether some R is known to be ``-inf``."""

    forbids: bool

    def __call__(self, tokens: Tensor, lengths: Tensor, prompt_ids: Tensor) -> Tensor: ...

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Reward:
        """Check that the reward fits, before any work; return the reward to use."""
        ...

    def to(self, device: torch.device | str) -> Reward: ...
