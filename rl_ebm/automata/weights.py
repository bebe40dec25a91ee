"""Weights and rewards at the door: real numbers below +inf."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from rl_ebm.messages.arguments import shown


def check_tensor(table: object, name: str) -> Tensor:
    """Raise TypeError unless it is a dense tensor of real numbers."""
    if not isinstance(table, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(table).__name__}: torch.as_tensor makes one"
        )
    if table.is_complex() or table.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of real numbers, got {table.dtype}, {table.layout}"
        )
    return table


def check_table(table: object, name: str, shape: tuple[int, ...]) -> Tensor:
    """A table of rewards of a shape, real numbers below +inf.

    Raises:
        TypeError: no dense tensor of real numbers.
        ValueError: another shape, NaN or +inf.
    """
    found = check_tensor(table, name)
    if tuple(found.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)}, expected {shape}")
    check_values(found, name)
    return found


def check_values(reward: Shaped[Tensor, "..."], where: str) -> None:
    """Raise unless every reward is a number below +inf (``-inf`` is legal).

    Raises:
        TypeError: no dense tensor of real numbers.
        ValueError: NaN or +inf, with the place of the first.
    """
    if not isinstance(where, str):
        raise TypeError(f"where must be text for a sentence, got {shown(where)}")
    check_tensor(reward, where)
    if reward.device.type == "meta":
        raise ValueError(f"{where} is on the device 'meta', where tensors have no values")
    wrong = torch.isnan(reward) | torch.isposinf(reward)
    if bool(wrong.any()):
        place = wrong.flatten().nonzero()[0, 0]
        value = float(reward.flatten()[place])
        raise ValueError(
            f"{where} is {value} at index {int(place)}: a reward must be a number below +inf "
            "(-inf marks an impossible response)"
        )
