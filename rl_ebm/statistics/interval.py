"""Estimates with the interval that is known around them, and how much is claimed for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from rl_ebm.messages.arguments import WrongTypeError, is_number, shown, whole
from rl_ebm.messages.numerals import as_json

Kind = Literal["finite-sample", "one-sided finite-sample", "asymptotic", "worth nothing"]


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the truth with probability >= ``confidence``.

    The probability is over the samples, and each interval's own: several intervals hold together
    with probability 1 less the sum of what each may fail.
    """

    estimate: float
    low: float
    """-inf where nothing is known on this side"""
    high: float
    """+inf where nothing is known on this side"""
    confidence: float
    kind: Kind
    """``finite-sample``: the confidence holds for every number of samples and every law of
    them. ``one-sided finite-sample``: the same, and one of the ends at least says nothing (it
    is infinite, or 0 for what cannot be negative). ``asymptotic``: the confidence is a limit for
    many samples (normal theory), and the sample shows nothing against it
    (:mod:`rl_ebm.statistics.tails`); an end against which something speaks is infinite. ``worth
    nothing``: neither end says anything that was not known before."""

    def __post_init__(self) -> None:
        if any(math.isnan(x) for x in (self.estimate, self.low, self.high)):
            raise ValueError(f"an interval never holds nan, got {self}")
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        check_confidence(self.confidence)

    @property
    def width(self) -> float:
        """high - low; 0 where both are the same infinity."""
        return 0.0 if self.low == self.high else self.high - self.low

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite numbers are the strings "Infinity" and "-Infinity"."""
        return {name: as_json(x) for name, x in asdict(self).items()}

    def __str__(self) -> str:
        low, high = (
            ("[" if math.isfinite(self.low) else "("),
            ("]" if self.high < math.inf else ")"),
        )
        return (
            f"{self.estimate:.6g} {low}{self.low:.6g}, {self.high:.6g}{high} "
            f"{100 * self.confidence:g}% {self.kind}"
        )


MOST_SAMPLES = 10**8
"""whose log-weights and rewards take some GB"""


def check_confidence(confidence: float) -> None:
    """Raise ValueError unless 0 < confidence < 1."""
    if not (is_number(confidence) and 0 < confidence < 1):
        kind = ValueError if is_number(confidence) else WrongTypeError
        raise kind(f"confidence must be a number in (0, 1), got {shown(confidence)}")


def check_samples(samples: int, least: int = 1, why: str = "") -> int:
    """A number of samples in range, as an int.

    Raises:
        ValueError: no integer, or one out of range.
    """
    samples = whole("samples", samples)
    if samples < least:
        raise ValueError(f"samples must be at least {least}, got {samples}{why}")
    if samples > MOST_SAMPLES:
        raise ValueError(f"samples must be at most {MOST_SAMPLES:,}, got {shown(samples)}")
    return samples


@lru_cache(maxsize=64)
def student_quantile(confidence: float, df: int) -> float:
    """t with P(|T| <= t) = confidence, for Student's t with ``df`` degrees of freedom.

    Up to 1,000 degrees of freedom by bisection of the closed form of the distribution function
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), beyond by its expansion in 1 / df (26.7.5).

    Raises:
        ValueError: a confidence out of (0, 1), or df < 1.
    """
    check_confidence(confidence)
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    if df > 1000:
        z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
        series = (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        return z + series
    # In the angle theta = atan(t / sqrt(df)) the bracket is finite.
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, df) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(df)


def _student_mass(theta: float, df: int) -> float:
    """P(|T| <= tan(theta) sqrt(df))."""
    cos, sin = math.cos(theta), math.sin(theta)
    odd = df % 2
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for j in range(df // 2):
        total += term
        i = 2 * j + 1 + odd
        term *= cos * cos * i / (i + 1)
    return 2 / math.pi * (theta + sin * total) if odd else sin * total


def mean_interval(mean: float, std: float, n: int, confidence: float) -> Interval:
    """Of an expectation, by Student's t from a sample's mean and (n - 1) standard deviation.

    Asymptotic: exact for normal samples only. One sample says nothing of the spread: infinite.
    An infinite mean is certain, if what was averaged is bounded on the other side: one infinite
    value of positive probability makes the expectation infinite.
    """
    if math.isinf(mean):
        return Interval(mean, mean, mean, confidence, "finite-sample")
    half = math.inf
    if n >= 2:
        half = student_quantile(confidence, n - 1) * std / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, confidence, "asymptotic")


def difference(a: Interval, b: Interval, least: float = -math.inf) -> Interval:
    """Of a - b by the union bound: it fails no more often than the two together.

    A term that is infinite for certain, a = inf or b = -inf, decides: the other is to be finite,
    as log Z is, even where nothing was learned of it.

    Args:
        least: what the difference is known to be at least: 0 for a divergence.

    Raises:
        ValueError: intervals that may fail with probability 1 together.
    """
    confidence = round(a.confidence + b.confidence - 1, 12)
    if a.low == math.inf or b.high == -math.inf:
        return Interval(math.inf, math.inf, math.inf, confidence, "finite-sample")
    low = -math.inf if -math.inf in (a.low, -b.high) else a.low - b.high
    high = math.inf if math.inf in (a.high, -b.low) else a.high - b.low
    undefined = math.isinf(a.estimate) and a.estimate == b.estimate
    estimate = math.inf if undefined else a.estimate - b.estimate
    known = low > least and high < math.inf
    kind: Kind = "finite-sample" if known else "one-sided finite-sample"
    if "asymptotic" in (a.kind, b.kind):
        kind = "asymptotic"
    if "worth nothing" in (a.kind, b.kind) and low <= least and high == math.inf:
        kind = "worth nothing"
    low, high = max(low, least), max(high, least)
    return Interval(max(estimate, least), low, high, confidence, kind)


def affine(x: Interval, scale: float, shift: float = 0.0) -> Interval:
    """Of scale X + shift, scale not 0: as sure as that of X."""
    ends = sorted((scale * x.low + shift, scale * x.high + shift))
    return replace(x, estimate=scale * x.estimate + shift, low=ends[0], high=ends[1])


def nonnegative(x: Interval) -> Interval:
    """Of the same unknown where it is known to be at least 0."""
    low, high = max(x.low, 0.0), max(x.high, 0.0)
    kind: Kind = "worth nothing" if low == 0 and high == math.inf else x.kind
    return replace(x, estimate=max(x.estimate, 0.0), low=low, high=high, kind=kind)


def average(intervals: Sequence[Interval]) -> Interval:
    """Of the mean of several unknowns, by the union bound over their intervals."""
    n = len(intervals)
    if n == 1:
        return intervals[0]
    kinds = {interval.kind for interval in intervals}
    order: tuple[Kind, ...] = ("asymptotic", "one-sided finite-sample", "finite-sample")
    kind: Kind = next((kind for kind in order if kind in kinds), "worth nothing")
    if kind == "finite-sample" and "worth nothing" in kinds:
        kind = "one-sided finite-sample"
    return Interval(
        _mean([i.estimate for i in intervals], math.inf),
        _mean([i.low for i in intervals], -math.inf),
        _mean([i.high for i in intervals], math.inf),
        round(1 - sum(1 - i.confidence for i in intervals), 12),
        kind,
    )


def _mean(values: Sequence[float], undefined: float) -> float:
    """Mean of numbers that may be infinite; ``undefined`` where it is inf - inf."""
    if math.inf in values and -math.inf in values:
        return undefined
    return math.fsum(values) / len(values)
