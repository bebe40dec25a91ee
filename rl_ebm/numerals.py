"""Numbers as users give them: what is no number of the kind that is wanted is one sentence."""

from __future__ import annotations

import math
import re
from numbers import Real
from operator import index
from typing import SupportsIndex

_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")
_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?inf", re.IGNORECASE)


def whole(text: str) -> int:
    """An integer in ASCII digits: ``int`` takes ``1_0``, white space and other digits as well.

    Raises:
        ValueError: it is none.
    """
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{quoted(text)} is no whole number")
    return int(text)


def real(text: str) -> float:
    """A number below +inf in ASCII digits; ``-inf`` is one, NaN and what overflows are not.

    Raises:
        ValueError: it is none.
    """
    if not _REAL.fullmatch(text):
        raise ValueError(f"{quoted(text)} is no number")
    value = float(text)
    if value == math.inf or (math.isinf(value) and "inf" not in text.lower()):
        raise ValueError(f"{quoted(text)} is no number that is finite, or -inf")
    return value


def check_whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """An integer of a range; booleans are none.

    Raises:
        TypeError: no integer.
        ValueError: one out of range.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be an integer, got {quoted(value)}")
    found = index(value)
    if found < least or (most is not None and found > most):
        limit = f">= {least}" if most is None else f"in [{least:,}, {most:,}]"
        raise ValueError(f"{name} must be {limit}, got {quoted(value)}")
    return found


def check_real(value: object, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number of a range; booleans are none.

    Raises:
        TypeError: no number.
        ValueError: one out of range.
    """
    try:
        found = float(value) if isinstance(value, Real) and not _is_bool(value) else None
    except OverflowError:
        found = math.inf
    if found is None:
        raise TypeError(f"{name} must be a number, got {quoted(value)}")
    if not (least <= found <= most and abs(found) < math.inf):
        limit = "a finite number" + (f" >= {least:g}" if least > -math.inf else "")
        limit += f", at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} must be {limit}, got {quoted(value)}")
    return found


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def quoted(value: object) -> str:
    """How a value is written, cut where it would fill the screen."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:56]} ..."
