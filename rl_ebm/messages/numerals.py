"""Numbers in text: what is no number of the kind that is wanted is a sentence; infinite numbers."""

from __future__ import annotations

import math
import re
from typing import Any

from rl_ebm.messages.arguments import shown

_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")
_REAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?inf", re.IGNORECASE)


def parse_whole(text: str) -> int:
    """An integer in ASCII digits: ``int`` takes ``1_0``, white space and other digits as well.

    Raises:
        ValueError: it is none.
    """
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{shown(text)} is no whole number")
    return int(text)


def parse_real(text: str) -> float:
    """A number below +inf in ASCII digits; ``-inf`` is one, NaN and what overflows are not.

    Raises:
        ValueError: it is none.
    """
    if not _REAL.fullmatch(text):
        raise ValueError(f"{shown(text)} is no number")
    value = float(text)
    if value == math.inf or (math.isinf(value) and "inf" not in text.lower()):
        raise ValueError(f"{shown(text)} is no number that is finite, or -inf")
    return value


def as_json(value: Any) -> Any:
    """A value as the reports' JSON has it: infinite numbers are the strings "Infinity" and
    "-Infinity", which ``float`` reads; anything else is left as it is.
    """
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
