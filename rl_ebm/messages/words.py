"""Words for error messages: the nearest known name, large numbers, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from unicodedata import category

_TURNS = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""what ends a line, or changes the direction of text"""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    if not known:
        return ""
    close = get_close_matches(name[:200], known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def printable(text: str) -> str:
    r"""Text in which nothing moves a cursor, changes a colour or turns a line around.

    Such characters are escaped, \x1b say; others, a \ too, are as they were. For people alone.
    """

    def acts(c: str) -> bool:
        return category(c) in ("Cc", "Cs") or c in _TURNS

    return "".join(ascii(c)[1:-1] if acts(c) else c for c in text)


def count_text(n: int) -> str:
    """A whole number for people; a power of ten where it is astronomical."""
    return f"{n:,}" if n < 10**15 else f"about 10^{math.log10(n):.0f}"


def bytes_text(n: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    power = int(math.log10(max(n, 1))) // 3
    units = ("bytes", "KB", "MB", "GB", "TB", "PB")
    if power < len(units):
        return f"{n / 1000**power:.3g} {units[power]}"
    return f"about 10^{math.log10(n):.0f} bytes"
