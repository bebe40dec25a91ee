"""Arguments at the door: numbers of the right kind, or one sentence that says what is."""

from __future__ import annotations

import math
import os
import stat
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


class WrongTypeError(TypeError, ValueError):
    """An argument of another type than is wanted: a TypeError, and a wrong value all the same."""


def whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """An integer in [least, most], of Python or of numpy, as an int; None for no limit.

    Raises:
        WrongTypeError: no integer; True and 2.0 are none.
        ValueError: one out of range.
    """
    end = "" if least is None else f" >= {least}" if most is None else f" in [{least}, {most}]"
    sentence = f"{name} must be an integer{end}, got {shown(value)}"
    if not is_whole(value):
        raise WrongTypeError(sentence)
    number = int(value)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(sentence)
    return number


def is_whole(value: object) -> TypeGuard[int]:
    """Whether something is an integer, of Python or of numpy; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether something is a real number; True is none, and a tensor is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def finite(
    name: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: bool = False,
) -> float:
    """A finite number in [least, most] (``above``: and not ``least`` itself), as a float.

    Raises:
        WrongTypeError: no number; True is none.
        ValueError: one out of range.
    """
    end = "" if least == -math.inf else f" > {least:g}" if above else f" >= {least:g}"
    end += "" if most == math.inf else f", at most {most:g}"
    sentence = f"{name} must be a finite number{end}, got {shown(value)}"
    if not is_number(value):
        raise WrongTypeError(sentence)
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    low = number > least if above else number >= least
    if not (math.isfinite(number) and low and number <= most):
        raise ValueError(sentence)
    return number


def shown(value: object) -> str:
    """A value for a sentence: short, in one line, and of what is large the kind alone."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length():,} bits"
    if value is None or isinstance(value, (str, bytes, Real)):
        text = " ".join(repr(value[:80] if isinstance(value, (str, bytes)) else value).split())
        return text if len(text) <= 60 else f"{text[:56]} ..."
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


def holds_ids(value: object) -> TypeGuard[Tensor]:
    """Whether something is a tensor of integers, of whatever size; bools are none."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return value.dtype != torch.bool


def ids_tensor(name: str, value: object, ndim: int) -> Tensor:
    """A tensor of integer ids, as int64: what is counted with small ones overflows.

    Raises:
        TypeError: no tensor of integers.
    """
    shape = {1: "(B,)", 2: "(B, T)"}[ndim]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor of integers of shape {shape}, got {type(value).__name__}: "
            f"torch.tensor({name}) makes one"
        )
    if not holds_ids(value):
        kind = str(value.dtype).removeprefix("torch.")
        raise WrongTypeError(f"{name} must hold integers (int64), got a tensor of {kind}")
    return value.long()


def has_end(path: str | os.PathLike[str]) -> None:
    """Check that what is to be read whole is no device, as /dev/zero; files and pipes have an end.

    Raises:
        ValueError: it is one; what is not there, or cannot be opened, is for the caller to say.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ValueError(
            f"{shown(os.fspath(path))} is a device, which may have no end: give a file, or a pipe"
        )
