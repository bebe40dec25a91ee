"""Tail diagnostics: shapes that are known, and what speaks against normal theory."""

from __future__ import annotations

import math

import pytest
import torch
from certificate_cases import most_misses
from toy_policies import seeded

from rl_ebm.statistics.expectations import (
    Known,
    entropy_expectation,
    expectation,
    ratio_expectation,
    sample_interval,
)
from rl_ebm.statistics.interval import Interval, average, difference
from rl_ebm.statistics.tails import FEWEST, pareto_k, pareto_shape, skewness, unseen, upper_doubt

INF = math.inf


def pareto(k, n, seed=0):
    """Excesses of a generalised Pareto distribution of scale 1, by its quantile function."""
    u = torch.rand(n, generator=seeded(seed), dtype=torch.float64)
    return -torch.log(u) if k == 0 else (u**-k - 1) / k


def best_shape(x):
    """Maximum likelihood over a grid of shapes and scales, by the density as it stands."""
    best = (-INF, 0.0)
    for k in [i / 50 for i in range(-30, 80) if i]:
        for scale in [0.5 + i / 40 for i in range(60)]:
            z = 1 + k * x / scale
            if bool((z > 0).all()):
                value = float(-len(x) * math.log(scale) - (1 + 1 / k) * z.log().sum())
                best = max(best, (value, k))
    return best[1]


def zhang_stephens(x):
    """The estimate as the paper has it, number by number, with theta = k / scale."""
    x = sorted(x.tolist())
    n, m = len(x), 30 + int(math.sqrt(len(x)))

    def shape(theta):
        return -math.fsum(math.log1p(-theta * y) for y in x) / n

    def profile(theta):
        k = shape(theta)
        return n * (math.log(theta / k) + k - 1)

    quartile = x[int(n / 4 + 0.5) - 1]
    grid = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]
    logs = [profile(theta) for theta in grid]
    weights = [1 / math.fsum(math.exp(b - a) for b in logs) for a in logs]
    # Their k is that of a bounded tail where it is positive.
    return -shape(math.fsum(t * w for t, w in zip(grid, weights, strict=True)))


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.5, 1.0])
def test_the_shape_of_a_pareto_tail(k):
    x = pareto(k, 2000)
    got = pareto_shape(x)
    assert got == pytest.approx(k, abs=0.08)
    # A prior of ten excesses draws it towards 1/2.
    assert got == pytest.approx((2000 * best_shape(x) + 5) / 2010, abs=0.03)
    assert pareto_shape(3.0 * x) == pytest.approx(got, abs=1e-9)
    few = x[:20]
    assert pareto_shape(few) == pytest.approx((20 * zhang_stephens(few) + 5) / 30)
    assert pareto_shape(x[:4]) == -INF


def test_tails_of_samples():
    g = seeded(1)
    normal = torch.randn(1000, generator=g, dtype=torch.float64)
    assert pareto_k(normal) < 0.3
    heavy = pareto(1.2, 1000)
    assert pareto_k(heavy) > 0.5
    # The upper tail alone.
    assert pareto_k(-heavy) < 0.5
    assert pareto_k(torch.arange(10).repeat(100).double()) == -INF
    # Two clusters are no heavy tail, though a threshold in the lower one makes it look so.
    two = torch.cat([0.01 * normal[:176], 5 + 0.1 * normal[176:200]]).sort().values
    assert pareto_shape(two[160:] - two[159]) > 0.5
    assert pareto_k(two) < 0.5


def test_skewness():
    x = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    assert skewness(x) == pytest.approx(2 / 2**1.5)
    assert skewness(-x) == pytest.approx(-2 / 2**1.5)
    assert skewness(torch.ones(5).double()) == 0


def test_a_class_that_all_samples_miss():
    alpha, n = 0.05, 200
    assert (1 - unseen(alpha, n)) ** n == pytest.approx(alpha / 2, rel=0.05)


def test_what_speaks_against_an_upper_end():
    n, alpha = 400, 0.05
    x = torch.randn(n, generator=seeded(2), dtype=torch.float64)
    half = sample_interval(x, 1 - alpha).high - float(x.mean())

    def doubt(x, **more):
        half = sample_interval(x, 1 - alpha).high - float(x.mean())
        return upper_doubt(x, half, alpha, **more)

    assert doubt(x) == ""
    assert "too few" in doubt(x[: FEWEST - 1])
    assert doubt(x[:FEWEST]) == "" or "share" in doubt(x[:FEWEST])
    one = x.clone()
    one[0] = 40.0
    assert "share of the variance" in doubt(one)
    assert doubt(-one) == ""
    # A heavy tail of which no single sample has much.
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tail = (u**-0.7 - 1) / 0.7
    assert "heavy" in doubt(tail.clamp(max=float(tail.quantile(0.999))))
    assert "share" in doubt(tail)
    # Elsewhere: what would move the mean by more than the half-width, if it can be there.
    far = float(x.mean()) + torch.tensor([1.01, 0.99]).double() * half / unseen(alpha, n)
    sure = torch.ones(1).double()
    assert "hardly drawn" in doubt(x, elsewhere=far[:1], masses=sure)
    assert doubt(x, elsewhere=far[1:], masses=sure) == ""
    assert doubt(x, elsewhere=far[:1], masses=sure * unseen(alpha, n) / 2) == ""
    assert doubt(x, elsewhere=-100 * far, masses=torch.ones(2).double()) == ""
    # Where the tail is known to be light a far value weighs no more than it can.
    light = float(x.max())
    assert doubt(x, elsewhere=far[:1] + 20, masses=sure, light=light) == ""
    # Cochran's rule: 400 >= 25 g^2 for g <= 4.
    for few, words in ((40, ""), (20, "skewness")):
        values = torch.linspace(5, 6, few, dtype=torch.float64)
        skewed = torch.cat([torch.zeros(400 - few, dtype=torch.float64), values])
        assert (skewness(skewed) > 4) == bool(words)
        assert words in doubt(skewed)
        assert bool(doubt(skewed)) == bool(words)
        assert doubt(-skewed) == ""


# Expectations ------------------------------------------------------------------------------------


def test_ends_are_found_one_at_a_time():
    x = torch.rand(200, generator=seeded(3), dtype=torch.float64)
    want = sample_interval(x, 0.95)
    assert expectation(x, 0.95) == (want, "")
    found, why = expectation(x, 0.95, Known(above="it may be infinite"))
    assert (found.low, found.high, found.kind) == (want.low, INF, "asymptotic")
    assert why == "it may be infinite"
    found, why = expectation(x, 0.95, Known(below="a", above="b"))
    assert (found.low, found.high, found.kind, why) == (-INF, INF, "worth nothing", "a; b")
    # Beside an open end a bound holds for certain.
    found, _ = expectation(x, 0.95, Known(least=0.0, above="it may be infinite"))
    assert (found.high, found.kind) == (INF, "one-sided finite-sample")
    assert 0 < found.low < want.estimate
    found, _ = expectation(-x, 0.95, Known(most=0.0, below="it may be infinite"))
    assert (found.low, found.kind) == (-INF, "one-sided finite-sample")
    assert want.estimate < -found.low
    assert -1 < found.high < 0


@pytest.mark.parametrize("n", [1, 2, 29])
def test_few_samples_say_nothing_of_what_has_no_bounds(n):
    x = torch.rand(n, generator=seeded(n), dtype=torch.float64)
    found, why = expectation(x, 0.95)
    assert (found.low, found.high, found.kind) == (-INF, INF, "worth nothing")
    assert f"{n} samples are too few" in why
    found, why = expectation(x, 0.95, Known(0.0, 1.0))
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert (found.kind, why) == ("finite-sample", "")


def test_equal_samples_are_not_certain():
    x = torch.full((100,), 0.25, dtype=torch.float64)
    found, why = expectation(x, 0.95)
    assert (found.kind, "all samples are equal" in why) == ("worth nothing", True)
    found, _ = expectation(x, 0.95, Known(0.0, 1.0))
    assert found.low < 0.25 - 0.01
    assert found.high > 0.25 + 0.02
    found, _ = expectation(x, 0.95, Known(unit=1.0))
    # As of a class of spread 1 that 100 samples miss with 2.5%.
    assert found.high == pytest.approx(0.25 + math.log(40) / 100)
    assert found.low == pytest.approx(0.25 - math.log(40) / 100)


def test_an_infinity_that_is_possible_is_certain():
    x = torch.rand(100, generator=seeded(), dtype=torch.float64)
    mass = torch.full((2,), 1e-9, dtype=torch.float64)
    for end in (INF, -INF):
        elsewhere = torch.tensor([0.3, end], dtype=torch.float64)
        found, _ = expectation(x, 0.95, Known(elsewhere=elsewhere, masses=mass))
        assert found == Interval(end, end, end, 0.95, "finite-sample")
        seen, _ = expectation(torch.cat([x, elsewhere]), 0.95)
        assert seen == found


@pytest.mark.slow
def test_bounded_means_stay_within_their_bounds():
    repetitions, p = 400, 0.02
    draws = torch.rand(repetitions, 60, generator=seeded(7), dtype=torch.float64) < p
    found = [expectation(row.double(), 0.95, Known(0.0, 1.0)).interval for row in draws]
    assert all(0 <= i.low <= i.estimate <= i.high <= 1 for i in found)
    missed = sum(not i.low <= p <= i.high for i in found)
    assert missed <= most_misses(0.05, repetitions)
    # Scaled and moved, so are the intervals.
    moved, _ = expectation(3 - 2 * draws[0].double(), 0.95, Known(1.0, 3.0))
    assert moved.low == pytest.approx(3 - 2 * found[0].high)
    assert moved.high == pytest.approx(3 - 2 * found[0].low)


def test_ratios_have_a_lower_end_that_holds():
    g = seeded(9)
    weight = torch.randint(1, 5, (100,), generator=g).double()
    x = torch.where(torch.rand(100, generator=g) < 0.03, 90.0, 1.0).double()
    known = Known(0.0, elsewhere=x[:3], masses=torch.ones(3).double(), unit=1.0)
    found, why = ratio_expectation(x, weight, 4.0, 0.95, known, weight[:3])
    assert (found.high, found.kind) == (INF, "one-sided finite-sample")
    assert 0 < found.low <= found.estimate == pytest.approx(float(x.sum() / weight.sum()))
    assert found.low > 1 / 4
    assert "share" in why
    nothing, _ = ratio_expectation(0 * x, weight, 4.0, 0.95, known, weight[:3])
    assert nothing.low == 0


def test_entropies_hold_where_samples_show_one_response():
    # One response of 0.97, and 1,000 that share the rest: the entropy is 0.34.
    p = torch.cat([torch.tensor([0.97]), torch.full((1000,), 3e-5)]).double()
    truth, missed = -float((p * p.log()).sum()), 0
    for seed in range(100):
        ids = torch.multinomial(p, 40, replacement=True, generator=seeded(seed))
        got = entropy_expectation(p.log()[ids], math.log(1001), 0.95)
        missed += not got.low <= truth <= got.high
        assert 0 <= got.low <= got.estimate <= got.high <= math.log(1001)
    assert missed <= most_misses(0.05, 100)
    even = torch.full((50,), -math.log(8), dtype=torch.float64)
    got = entropy_expectation(even, math.log(8), 0.95)
    assert got.high == pytest.approx(math.log(8))


# Two intervals -----------------------------------------------------------------------------------


def test_nothing_in_nothing_out():
    nothing = Interval(1.0, -INF, INF, 0.97, "worth nothing")
    sure = Interval(2.0, 1.0, 3.0, 0.98, "finite-sample")
    assert difference(sure, nothing, least=0.0).kind == "worth nothing"
    assert difference(sure, nothing, least=0.0).low == 0
    assert average([nothing, nothing]).kind == "worth nothing"
    half = Interval(1.0, 0.0, INF, 0.97, "worth nothing")
    assert average([half, sure]) == Interval(1.5, 0.5, INF, 0.95, "one-sided finite-sample")
