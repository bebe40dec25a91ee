"""Rewards that are Python functions: on tensors, or as TRL writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from rl_ebm.rewards.base import Prompts, check_values
from rl_ebm.tokens import TokenSpace


class Function:
    """R from ``f(tokens, lengths) -> (B,)``, with prompts ``f(tokens, lengths, prompt_ids)``.

    The function gets (B, T) tokens with 0 past the end of each response. What it returns is
    checked: one number for each row, none of them NaN or +inf.
    """

    forbids = False

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
                f"shape ({len(tokens)},)"
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


def from_trl(
    function: Callable[..., Sequence[float | None]],
    decode: Callable[[list[int]], Any],
    columns: dict[str, Sequence[Any]] | None = None,
) -> TRLFunction:
    """A reward written for TRL, ``f(prompts, completions, **columns) -> list[float]``.

    Args:
        function: the reward function, unchanged.
        decode: token ids, without the EOS, to what the function takes (usually text); used for
            prompts and completions.
        columns: further data-set columns, one entry for each prompt of the EBM.
    """
    return TRLFunction(function, decode, columns)


class TRLFunction:
    """See :func:`from_trl`. The EBM tells it the prompts when it takes it."""

    forbids = False

    def __init__(
        self,
        function: Callable[..., Sequence[float | None]],
        decode: Callable[[list[int]], Any],
        columns: dict[str, Sequence[Any]] | None = None,
    ) -> None:
        self.function, self.decode, self.columns = function, decode, columns or {}
        self.prompts: list[Any] = []
        self.eos_id: int | None = None

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> TRLFunction:
        lists = [[]] if prompts is None else [list(p) for p in prompts]
        for name, column in self.columns.items():
            if len(column) != len(lists):
                raise ValueError(
                    f"column {name!r} has {len(column)} entries, expected one for each of the "
                    f"{len(lists)} prompts"
                )
        bound = TRLFunction(self.function, self.decode, self.columns)
        bound.prompts = [self.decode(p) for p in lists]
        bound.eos_id = space.eos_id
        return bound

    def __call__(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Shaped[Tensor, "B"]:
        stop = 0 if self.eos_id is None else 1
        completions = [
            self.decode(row[: n - stop])
            for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]
        rows = prompt_ids.tolist()
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        values = self.function(
            prompts=[self.prompts[i] for i in rows], completions=completions, **columns
        )
        if len(values) != len(rows):
            raise ValueError(
                f"the TRL reward returned {len(values)} values for {len(rows)} completions"
            )
        if any(value is None for value in values):
            raise ValueError(
                "the TRL reward returned None: rl-ebm has one reward for every response, so "
                "return a number (-inf for an impossible response)"
            )
        reward = torch.tensor(values, dtype=torch.float64)
        check_values(reward, "the TRL reward's value")
        return reward.to(tokens.device)

    def to(self, device: torch.device | str) -> TRLFunction:
        return self
