"""How sure a mean over runs is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rl_ebm.statistics.interval import student_quantile

ALIKE = 1e-6
"""of a mean, a half-width that no reader needs"""


def half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Of the interval of the mean at this level (Student's t); infinite for one value."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.inf
    return (
        student_quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    )


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of its 95% interval, as text; infinite where a value is.

    Where the half-width is less than :data:`ALIKE` of the mean: four digits, which all have.
    """
    if not values:
        return "not run"
    if math.inf in values:
        return "∞"
    if len(values) < 2:
        return f"{values[0]:.2g} (one run)"
    mean, half = statistics.fmean(values), half_width(values)
    digits = 6
    if 0 < half < ALIKE * abs(mean):
        return f"{_short(mean, 4)} (all alike)"
    if 0 < half < math.inf and mean != 0:
        # As many as reach the first digit of the half-width.
        digits = max(1, 1 + _place(mean) - _place(float(f"{half:.1g}")))
    return f"{_short(mean, digits)} ± {_short(half, 1)}"


def between(low: float, high: float, estimate: float | None = None) -> str:
    """An interval by its ends, as text: with as many digits as tell them apart, two at least.

    Args:
        estimate: what stands before it, to the same digits; None for nothing.
    """
    digits = 2
    if math.isfinite(high - low) and high > low:
        digits = max(2, 2 + _place(max(abs(low), abs(high))) - _place(high - low))
    ends = [
        _short(x, digits) if math.isfinite(x) else ("∞" if x > 0 else "-∞")
        for x in (low, high, *(() if estimate is None else (estimate,)))
    ]
    return " ".join([*ends[2:], f"[{ends[0]}, {ends[1]}]"])


def _place(x: float) -> int:
    """The power of ten of a number's first digit."""
    return math.floor(math.log10(abs(x)))


def _short(x: float, digits: int) -> str:
    """A number to so many digits, never with an exponent where it is large."""
    text = f"{x:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def geometric(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Geometric mean of positive values and its interval (Student's t on their logarithms)."""
    logs = [math.log(v) for v in values]
    mean, half = statistics.fmean(logs), half_width(logs, level)
    return math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 700.0))


def geometric_interval(values: Sequence[float]) -> str:
    """:func:`geometric` as text: for positive values on very different scales."""
    if len(values) < 2 or math.inf in values:
        return interval(values)
    mean, low, high = geometric(values)
    return f"{mean:.2g} ({low:.2g} to {high:.2g})"
