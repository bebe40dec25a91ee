"""Arguments at the door: numbers of the right kind, or one sentence that says what is."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, SupportsIndex, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    Whole = SupportsIndex
    Int = int
    Number = float | int
else:
    # Whatever comes in is answered by a sentence of ours, in the tests too, where annotations
    # are checked.
    Whole = Int = Number = object


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """An integer in [least, most], of Python or of numpy, as an int; None for no limit.

    Raises:
        ValueError: no integer, or out of range; True and 2.0 are none.
    """
    if is_whole(value):
        number = int(value)
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    end = "" if least is None else f" >= {least}" if most is None else f" in [{least}, {most}]"
    raise ValueError(f"{name} must be an integer{end}, got {shown(value)}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether something is an integer, of Python or of numpy; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a real number; True is none, and a tensor is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def finite(name: str, value: object, end: str, least: float, *, strict: bool = False) -> float:
    """A finite number >= ``least`` (``strict``: above it), as a float.

    Args:
        end: how the sentence says what is allowed, for example "> 0".

    Raises:
        ValueError: anything else.
    """
    if is_number(value):
        number = float(value)
        if math.isfinite(number) and (number > least or (number == least and not strict)):
            return number
    raise ValueError(f"{name} must be a finite number {end}, got {shown(value)}")


def shown(value: object) -> str:
    """A value for a sentence: short, and of a tensor or another large thing the kind alone."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (str, Real)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return type(value).__name__


def check_generator(generator: object, device: torch.device) -> None:
    """Check that something can draw on a device: None for torch's global generator.

    Raises:
        TypeError: no generator.
        ValueError: one of another device.
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "generator must be a torch.Generator, for example torch.Generator().manual_seed(0), "
            f"or None, got {shown(generator)}"
        )
    if generator.device.type != device.type and device.type != "meta":
        raise ValueError(
            f"the generator is on {generator.device} and the draws are on {device}: "
            f"torch.Generator({device.type!r}) makes one there"
        )


def as_device(device: object) -> torch.device:
    """A device by itself or by name.

    Raises:
        TypeError: neither.
        ValueError: no name of a device.
    """
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device must be a torch.device or its name, got {shown(device)}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device must be the name of one, for example 'cpu' or 'cuda', got {shown(device)}"
        ) from None


def flag(name: str, value: object, unset: bool = False) -> None:
    """Raise TypeError unless something is True or False (``unset``: or None)."""
    if not (isinstance(value, bool) or (unset and value is None)):
        raise TypeError(
            f"{name} must be True{',' if unset else ' or'} False{' or None' if unset else ''}, "
            f"got {shown(value)}"
        )


def ids_tensor(name: str, value: object, ndim: int) -> Tensor:
    """A tensor of integer ids, as int64.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor of another kind or number of dimensions.
    """
    shape = {1: "(B,)", 2: "(B, T)"}[ndim]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor of integers of shape {shape}, got {type(value).__name__}: "
            f"torch.tensor({name}) makes one"
        )
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must hold integers (int64), got a tensor of {kind}")
    return value.long()
