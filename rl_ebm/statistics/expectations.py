"""The interval of an expectation from a sample: as much as can be claimed, and why no more.

Normal theory where :mod:`rl_ebm.statistics.tails` finds nothing against it, one end at a time; else
a bound that holds for every number of samples, where the variable is bounded on that side
(:mod:`rl_ebm.statistics.mean_bounds`); else no end at all. Where all values and their probabilities
are listed, normal theory where the law allows it; else the law's own mean is an end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.statistics.interval import Interval, Kind, mean_interval
from rl_ebm.statistics.mean_bounds import betting_lower, betting_upper
from rl_ebm.statistics.tails import is_normal, unseen, upper_doubt

INF = math.inf
_FLAT = 1e-9
"""a spread that is rounding, relatively"""
_ROUNDING = 1e-6
"""the error of a mean by a list, relatively: a policy may round its logits to float32"""


@dataclass(frozen=True)
class Known:
    """What is known of a variable X besides a sample of it.

    Attributes:
        least, most: bounds that are certain.
        elsewhere: X at responses that the law hardly draws, each of positive probability; where
            it is infinite, so is E X.
        masses: about how probable responses like these are together; where listed, each one's own
            probability.
        listed: whether these are all the values that X takes.
        below, above: why E X may be ``-inf``, ``+inf`` although no sample is; "" where it cannot.
        light_below, light_above: where a tail is known to be light, the point at which it begins:
            P(X <= light_below - d) <= exp(-d), P(X >= light_above + d) <= exp(-d).
        unit: a spread that would matter, for a sample that shows none.
    """

    least: float = -INF
    most: float = INF
    elsewhere: Float[Tensor, "e"] | None = None
    masses: Float[Tensor, "e"] | None = None
    listed: bool = False
    below: str = ""
    above: str = ""
    light_below: float = -INF
    light_above: float = INF
    unit: float = 0.0


class Found(NamedTuple):
    """An interval, and why an end is open; "" where none is, or where it always was."""

    interval: Interval
    why: str


def sample_interval(x: Float[Tensor, "n"], confidence: float) -> Interval:
    """Of E x, asymptotic; certain where a sample is infinite: see :func:`mean_interval`."""
    std = float(x.std()) if len(x) > 1 and bool(torch.isfinite(x).all()) else math.inf
    return mean_interval(float(x.mean()), std, len(x), confidence)


def certain(x: float, confidence: float) -> Interval:
    """Of what is known exactly."""
    return Interval(x, x, x, confidence, "finite-sample")


def bounded(x: Float[Tensor, "n"], most: float, confidence: float) -> Interval:
    """Of E x, 0 <= x <= most, by betting on either side: it holds for every n."""
    alpha = 1 - confidence
    log_x, mean = x.log(), float(x.mean())
    low = float(betting_lower(log_x, alpha / 2).exp())
    high = float(betting_upper(log_x, math.log(most), alpha / 2).exp())
    return Interval(mean, min(low, mean), max(min(high, most), mean), confidence, "finite-sample")


def expectation(x: Float[Tensor, "n"], confidence: float, known: Known | None = None) -> Found:
    """Of E X from a sample of it; the estimate is the sample's mean.

    Each end has half of the chance to fail, whichever way it is found: that the way is chosen by
    looking at the sample makes no bound fail more often.
    """
    known = Known() if known is None else known
    for end in (-INF, INF):
        if bool((x == end).any()) or _has(known.elsewhere, end):
            return Found(certain(end, confidence), "")
    x, alpha = x.double().clamp(known.least, known.most), 1 - confidence
    if (law := _law(known)) is not None:
        return Found(_by_list(sample_interval(x, confidence), *law, len(x), known), "")
    normal, doubts = _normal_theory(x, confidence, known)
    # Beside an open end the other one is to hold for certain, where it can.
    shaky = bool(doubts[0]) or bool(doubts[1])
    mean, low, high = normal.estimate, normal.low, normal.high
    by_normal = [not doubt for doubt in doubts]
    if shaky and known.least > -INF:
        low, by_normal[0] = known.least + _betting(x - known.least, alpha / 2), False
    elif doubts[0]:
        low = -INF
    if shaky and known.most < INF:
        high, by_normal[1] = known.most - _betting(known.most - x, alpha / 2), False
    elif doubts[1]:
        high = INF
    low, high = max(min(low, mean), known.least), min(max(high, mean), known.most)
    kind: Kind = "finite-sample"
    if any(by_normal):
        kind = "asymptotic"
    elif (low <= known.least and high == INF) or (low == -INF and high >= known.most):
        kind = "worth nothing"
    elif INF in (-low, high):
        kind = "one-sided finite-sample"
    why = [doubt for doubt, end in zip(doubts, (-low, high), strict=True) if end == INF]
    return Found(Interval(mean, low, high, confidence, kind), "; ".join(dict.fromkeys(why)))


def _law(known: Known) -> tuple[Tensor, Tensor] | None:
    """All values of X and their probabilities, where these are known."""
    if not known.listed or known.elsewhere is None or known.masses is None:
        return None
    return known.elsewhere.double(), known.masses / known.masses.sum()


def _by_list(
    normal: Interval,
    x: Float[Tensor, "e"],
    p: Float[Tensor, "e"],
    n: int,
    known: Known,
    at: float = 0.0,
) -> Interval:
    """The interval of normal theory where the law allows it, else from one mean to the other.

    Which of them it is does not depend on the sample: so neither fails more often for it.

    Args:
        normal: of at + E X.
        x, p: the law of X.
    """
    mean, size = at + float(p @ x), max(known.unit, abs(at), float(p @ x.abs()))
    light = known.light_below > -INF, known.light_above < INF
    if not is_normal(x, p, n, _FLAT * size, light):
        error = _ROUNDING * size
        normal = replace(normal, low=mean - error, high=mean + error, kind="finite-sample")
    low, high = max(normal.low, known.least), min(normal.high, known.most)
    return replace(normal, low=min(low, normal.estimate), high=max(high, normal.estimate))


def _has(x: Tensor | None, value: float) -> bool:
    return x is not None and bool((x == value).any())


def _betting(x: Float[Tensor, "n"], alpha: float) -> float:
    """A lower bound on E x, x >= 0."""
    return float(betting_lower(x.clamp(min=0.0).log(), alpha).exp())


def _normal_theory(
    x: Float[Tensor, "n"], confidence: float, known: Known
) -> tuple[Interval, tuple[str, str]]:
    """The interval of normal theory, and what speaks against its lower and its upper end."""
    n, mean, alpha = len(x), float(x.mean()), 1 - confidence
    normal = sample_interval(x, confidence)
    if n > 1 and float(x.std()) <= _FLAT * max(known.unit, abs(mean)):
        if known.unit == 0:
            return normal, (_EQUAL, _EQUAL)
        # As from the rule of three: a spread that no sample shows may be that of a rare class.
        x, half = torch.full_like(x, mean), unseen(alpha, n) * known.unit
        normal = replace(normal, low=mean - half, high=mean + half)
    others, half = known.elsewhere, normal.high - mean
    below = upper_doubt(
        -x, half, alpha, None if others is None else -others, known.masses, -known.light_below
    )
    above = upper_doubt(x, half, alpha, others, known.masses, known.light_above)
    return normal, (known.below or below, known.above or above)


_EQUAL = "all samples are equal, which shows no spread"


def ratio_interval(
    x: Float[Tensor, "n"], weight: Float[Tensor, "n"], confidence: float
) -> Interval:
    """Of E x / E weight, by the delta method."""
    mean = float(x.sum() / weight.sum())
    if not math.isfinite(mean):
        return certain(mean, confidence)
    spread = sample_interval((x - mean * weight) / weight.mean(), confidence)
    # The deviations have mean 0 but for rounding.
    low, high = min(spread.low, 0.0), max(spread.high, 0.0)
    return Interval(mean, max(mean + low, 0.0), mean + high, confidence, "asymptotic")


def ratio_expectation(
    x: Float[Tensor, "n"],
    weight: Float[Tensor, "n"],
    most: float,
    confidence: float,
    known: Known,
    weights: Float[Tensor, "e"],
) -> Found:
    """Of E x / E weight, x >= 0 and 1 <= weight <= most, as :func:`expectation` does of E x.

    Args:
        known: of x.
        weights: those of the responses at which x is known elsewhere.
    """
    plain = ratio_interval(x, weight, confidence)
    if _has(known.elsewhere, INF) or math.isinf(plain.estimate):
        return Found(certain(INF, confidence), "")
    assert known.elsewhere is not None
    if (law := _law(known)) is not None:
        values, p = law
        ratio, mean = float(p @ values / (p @ weights)), float(p @ weights)
        deviation = (values - ratio * weights) / mean
        # Bounds on x are none on the ratio.
        alone = replace(known, least=0.0, most=INF)
        return Found(_by_list(plain, deviation, p, len(x), alone, ratio), "")
    scale = weight.mean()
    others = (known.elsewhere - plain.estimate * weights) / scale
    deviation = (x - plain.estimate * weight) / scale
    shown = replace(known, least=-INF, most=INF, elsewhere=others)
    interval, why = expectation(deviation, confidence, shown)
    if interval.low > -INF and interval.high < INF:
        low, high = max(plain.estimate + interval.low, 0.0), plain.estimate + interval.high
        return Found(Interval(plain.estimate, low, high, confidence, interval.kind), "")
    # E x / E weight >= a lower bound on E x over an upper one on E weight.
    alpha = (1 - confidence) / 2
    below = _betting(x, alpha) / (most - _betting(most - weight, alpha))
    low = min(below, plain.estimate)
    kind: Kind = "one-sided finite-sample" if low > 0 else "worth nothing"
    return Found(Interval(plain.estimate, low, INF, confidence, kind), why)


def entropy_expectation(
    log_pi: Float[Tensor, "n"], log_count: float, confidence: float, known: Known | None = None
) -> Interval:
    """Of the entropy of a law over exp(log_count) responses, from log-probabilities of a sample.

    X = -log pi has no bound, but little of its mean is beyond c = log_count + log n: p (-log p - c)
    is at most exp(-c - 1), which is 1 / (e n) for all responses together. So where normal theory is
    in doubt min(X, c) is bounded by betting.

    Args:
        known: of X.
    """
    n, alpha = len(log_pi), 1 - confidence
    x, most = -log_pi.double(), log_count
    found = expectation(x, confidence, known).interval
    if INF not in (-found.low, found.high):
        low, high, kind = found.low, found.high, found.kind
    else:
        cut = log_count + math.log(n)
        short = x.clamp(max=cut)
        low, kind = _betting(short, alpha / 2), "finite-sample"
        high = cut - _betting(cut - short, alpha / 2) + 1 / (math.e * n)
    mean = min(max(found.estimate, 0.0), most)
    low, high = max(min(low, mean), 0.0), min(max(high, mean), most)
    return Interval(mean, low, high, confidence, kind)
