"""Words for error messages: the nearest known name, large numbers, bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    if not known:
        return ""
    close = get_close_matches(name[:200], known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def printable(text: str) -> str:
    """Text in which nothing moves a cursor, changes a colour or turns a line around: escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
