"""Rewards that are Python functions on tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from rl_ebm.automata.weights import check_values
from rl_ebm.rewards.base import Prompts
from rl_ebm.tokens import TokenSpace


class Function:
    """R from ``f(tokens, lengths) -> (B,)``, with prompts ``f(tokens, lengths, prompt_ids)``.

    The function gets (B, T) tokens with 0 past the end of each response. What it returns is
    checked: one number for each row, none of them NaN or +inf.
    """

    forbids = False
    called = True
    device = None

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.with_prompts = False

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Function:
        bound = Function(self.function)
        bound.with_prompts = prompts is not None
        return bound

    def __call__(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Shaped[Tensor, "B"]:
        args = (tokens, lengths, prompt_ids) if self.with_prompts else (tokens, lengths)
        reward = self.function(*args)
        if not isinstance(reward, Tensor):
            raise TypeError(
                f"the reward function returned {type(reward).__name__}, expected a tensor of "
                f"shape ({len(tokens)},): torch.as_tensor makes one"
            )
        if reward.is_complex() or reward.layout != torch.strided:
            raise TypeError(
                f"the reward function returned {reward.dtype}, {reward.layout}: expected a dense "
                "tensor of real numbers"
            )
        if reward.shape != (len(tokens),):
            raise ValueError(
                f"the reward function returned shape {tuple(reward.shape)}, expected "
                f"({len(tokens)},): one number for each row"
            )
        reward = reward.detach()
        if reward.dtype not in (torch.float32, torch.float64):
            reward = reward.double()
        # On a GPU the check would make every step wait; the training loop notices NaN there.
        if reward.device.type == "cpu":
            check_values(reward, "the reward function's value")
        return reward.to(tokens.device)

    def to(self, device: torch.device | str) -> Function:
        """Moves a copy of a module; any other function gets tokens on the device as it is."""
        moved = Function(self.function)
        if isinstance(self.function, torch.nn.Module):
            moved = Function(copy.deepcopy(self.function).to(device))
        moved.with_prompts = self.with_prompts
        return moved
