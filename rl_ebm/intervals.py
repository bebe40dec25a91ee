"""How sure a mean over runs is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Two-sided 95% quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL95 = 1.96


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of the mean (Student's t); infinite for one value."""
    if len(values) < 2:
        return math.inf
    quantile = T95.get(len(values) - 1, NORMAL95 * (1 + 1.3 / len(values)))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of its 95% interval, as text."""
    if not values:
        return "not run"
    if len(values) < 2:
        return f"{values[0]:.2g} (one run)"
    return f"{statistics.fmean(values):.2g} ± {half_width(values):.1g}"


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of positive values and its 95% interval (Student's t on their logarithms)."""
    logs = [math.log(v) for v in values]
    mean, half = statistics.fmean(logs), half_width(logs)
    return math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 700.0))


def geometric_interval(values: Sequence[float]) -> str:
    """:func:`geometric` as text: for positive values on very different scales."""
    if len(values) < 2:
        return interval(values)
    mean, low, high = geometric(values)
    return f"{mean:.2g} ({low:.2g} to {high:.2g})"
