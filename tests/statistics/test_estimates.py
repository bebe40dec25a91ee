"""Intervals: quantiles against an integral, and what may be concluded from two of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from certificate_cases import REPETITIONS, binomial_quantile, most_misses
from toy_policies import seeded

from rl_ebm.certificates import sample_interval
from rl_ebm.statistics.interval import (
    Interval,
    average,
    difference,
    mean_interval,
    student_quantile,
)

INF = math.inf


def mass_by_integration(t, df, steps=20_000):
    """P(|T| <= t) by Simpson's rule on the density."""
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    h = t / steps
    density = [
        math.exp(log_c - (df + 1) / 2 * math.log1p((i * h) ** 2 / df)) for i in range(steps + 1)
    ]
    odd, even = math.fsum(density[1:-1:2]), math.fsum(density[2:-1:2])
    return 2 * h / 3 * (density[0] + 4 * odd + 2 * even + density[-1])


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9875])
@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30, 999, 1000, 1001, 5000])
def test_quantiles_hold_their_mass(df, confidence):
    t = student_quantile(confidence, df)
    assert mass_by_integration(t, df) == pytest.approx(confidence, abs=1e-7)


T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""two-sided 95% quantiles of Student's t as textbooks print them, by degrees of freedom"""


def test_quantiles_are_those_of_the_tables():
    for df, t in T95.items():
        assert student_quantile(0.95, df) == pytest.approx(t, abs=5.1e-4)


@pytest.mark.parametrize(("confidence", "df", "word"), [(1.0, 3, "confidence"), (0.9, 0, "df")])
def test_wrong_quantiles(confidence, df, word):
    with pytest.raises(ValueError, match=word):
        student_quantile(confidence, df)


@pytest.mark.parametrize(("n", "law"), [(2, torch.randn), (6, torch.randn), (300, torch.rand)])
def test_asymptotic_intervals_hold_nearly_as_often_as_they_say(n, law):
    # Exact for normal samples; for uniform ones n is large.
    x = law(REPETITIONS, n, generator=seeded(n), dtype=torch.float64)
    truth = 0.0 if law is torch.randn else 0.5
    intervals = [sample_interval(row, 0.9) for row in x]
    misses = sum(not i.low <= truth <= i.high for i in intervals)
    assert REPETITIONS - binomial_quantile(0.999, REPETITIONS, 0.9) <= misses <= most_misses(0.1)
    assert {i.kind for i in intervals} == {"asymptotic"}


def test_a_mean_and_its_interval():
    got = mean_interval(3.0, 2.0, 16, 0.95)
    assert (got.estimate, got.low, got.high) == (
        3.0,
        pytest.approx(3 - 2.13145 / 2, abs=1e-5),
        pytest.approx(3 + 2.13145 / 2, abs=1e-5),
    )
    alone = mean_interval(3.0, INF, 1, 0.95)
    assert (alone.estimate, alone.low, alone.high, alone.kind) == (3.0, -INF, INF, "asymptotic")
    certain = mean_interval(-INF, INF, 5, 0.95)
    assert (certain.estimate, certain.low, certain.high) == (-INF, -INF, -INF)
    assert certain.kind == "finite-sample"


# Two intervals ----------------------------------------------------------------------------------


def finite(estimate, low, high, confidence=0.98):
    return Interval(estimate, low, high, confidence, "finite-sample")


def test_a_difference_takes_the_worst_of_both():
    a, b = finite(5.0, 4.0, 7.0), finite(1.0, 0.5, 3.0, 0.97)
    assert difference(a, b) == Interval(4.0, 1.0, 6.5, 0.95, "finite-sample")
    clipped = difference(b, a, least=0.0)
    assert clipped == Interval(0.0, 0.0, 0.0, 0.95, "one-sided finite-sample")
    asymptotic = Interval(1.0, 0.5, 3.0, 0.97, "asymptotic")
    assert difference(a, asymptotic).kind == "asymptotic"
    assert difference(asymptotic, a).kind == "asymptotic"


def test_a_difference_with_an_open_end_has_one():
    a, b = finite(5.0, 4.0, INF), finite(1.0, 0.5, 3.0)
    assert difference(a, b) == Interval(4.0, 1.0, INF, 0.96, "one-sided finite-sample")
    assert difference(b, a, least=0.0) == Interval(0.0, 0.0, 0.0, 0.96, "one-sided finite-sample")
    nothing = finite(-INF, -INF, INF)
    assert difference(nothing, b).low == -INF
    assert difference(nothing, b).high == INF
    assert difference(nothing, finite(2.0, -INF, INF), least=0.0).low == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (finite(1.0, 0.0, INF), finite(-INF, -INF, -INF)),
        (finite(-INF, -INF, INF), finite(-INF, -INF, -INF)),
        (finite(INF, INF, INF), finite(1.0, 0.0, INF)),
    ],
)
def test_a_certain_infinity_decides(a, b):
    assert difference(a, b, least=0.0) == Interval(INF, INF, INF, 0.96, "finite-sample")


def test_an_average_fails_no_more_often_than_all_together():
    a, b = finite(5.0, 4.0, 7.0), Interval(1.0, 0.0, INF, 0.97, "one-sided finite-sample")
    assert average([a, b]) == Interval(3.0, 2.0, INF, 0.95, "one-sided finite-sample")
    c = Interval(1.0, -INF, 3.0, 0.97, "asymptotic")
    assert average([a, b, c]) == Interval(7 / 3, -INF, INF, 0.92, "asymptotic")
    assert average([a]) is a
    mixed = average([finite(INF, 0.0, INF), finite(-INF, -INF, 0.0)])
    assert (mixed.estimate, mixed.low, mixed.high) == (INF, -INF, INF)


# The interval itself -----------------------------------------------------------------------------


def test_an_interval_as_json_and_text():
    interval = Interval(0.25, -INF, INF, 0.95, "asymptotic")
    assert json.loads(json.dumps(interval.to_dict(), allow_nan=False)) == {
        "estimate": 0.25,
        "low": "-Infinity",
        "high": "Infinity",
        "confidence": 0.95,
        "kind": "asymptotic",
    }
    assert str(interval) == "0.25 (-inf, inf) 95% asymptotic"
    assert str(finite(1.5, 1.0, 2.0)) == "1.5 [1, 2] 98% finite-sample"
    assert interval.width == INF
    assert finite(INF, INF, INF).width == 0
    assert finite(1.5, 1.0, 2.0).width == 1


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((math.nan, 0.0, 1.0, 0.9), "nan"),
        ((0.0, math.nan, 1.0, 0.9), "nan"),
        ((0.0, 2.0, 1.0, 0.9), "low must not be above high"),
        ((0.0, 0.0, 1.0, 1.0), "confidence must be a number in"),
        ((0.0, 0.0, 1.0, 0.0), "confidence must be a number in"),
    ],
)
def test_wrong_intervals(values, word):
    with pytest.raises(ValueError, match=word):
        Interval(*values, "finite-sample")
