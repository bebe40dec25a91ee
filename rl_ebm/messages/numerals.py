"""Numbers in text: what is no number of the kind that is wanted is one sentence."""

from __future__ import annotations

import math
import re

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
