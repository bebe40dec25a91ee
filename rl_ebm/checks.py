"""Types of arguments that many doors check: tensors of integers, counts."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor


def check_integers(x: object, name: str) -> None:
    """Raise TypeError unless x is a tensor of integers."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor of integers, got {type(x).__name__}: use torch.tensor(...)"
        )
    if x.dtype == torch.bool or x.dtype.is_floating_point or x.dtype.is_complex:
        kind = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be a tensor of integers, got dtype {kind}: use {name}.long()")


def check_count(n: object, name: str = "n") -> None:
    """Raise unless n is an integer >= 0.

    Raises:
        TypeError: no integer.
        ValueError: a negative one.
    """
    if not is_integer(n):
        raise TypeError(f"{name} must be an integer >= 0, got {n!r}")
    if isinstance(n, Integral) and n < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {n!r}")


def is_integer(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)
