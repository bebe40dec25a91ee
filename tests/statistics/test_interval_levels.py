"""How the chance to fail is shared out between the ends of an interval, and the spread it is of."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.certificates.limits import log_z_limits
from rl_ebm.policies import Tabular
from rl_ebm.statistics.expectations import (
    Known,
    bounded,
    entropy_expectation,
    expectation,
    ratio_expectation,
    ratio_interval,
    sample_interval,
)
from rl_ebm.statistics.interval import mean_interval
from rl_ebm.statistics.mean_bounds import betting_lower, betting_upper
from rl_ebm.statistics.tails import FEWEST, upper_doubt
from rl_ebm.studies.seeds import geometric, half_width
from rl_ebm.verification.along_samples import verify_sampled

INF = math.inf


def lower(x, alpha):
    """A lower bound on E x by betting."""
    return float(betting_lower(x.log(), alpha).exp())


def quantile(confidence, df):
    """Student's t in closed form, for one and two degrees of freedom."""
    if df == 1:
        return math.tan(math.pi * confidence / 2)
    return confidence * math.sqrt(2 / (1 - confidence**2))


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("values", [[0.0, 2.0], [1.0, 4.0, 5.5]])
def test_the_spread_of_a_sample_is_that_of_n_less_one(values, confidence):
    n = len(values)
    half = quantile(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    by_numbers = mean_interval(mean, statistics.stdev(values), n, confidence)
    by_sample = sample_interval(torch.tensor(values, dtype=torch.float64), confidence)
    for got in (by_numbers, by_sample):
        assert got.low == pytest.approx(mean - half)
        assert got.high == pytest.approx(mean + half)


def test_so_is_that_of_a_ratio():
    x, weight = torch.tensor([1.0, 5.0]).double(), torch.tensor([2.0, 1.0]).double()
    deviations = [(a - 2.0 * b) / 1.5 for a, b in ((1.0, 2.0), (5.0, 1.0))]
    half = quantile(0.5, 1) * statistics.stdev(deviations) / math.sqrt(2)
    got = ratio_interval(x, weight, 0.5)
    assert got.low == pytest.approx(2.0 - half)
    assert got.high == pytest.approx(2.0 + half)


@pytest.mark.parametrize("values", [[0.5, 2.0], [1.0, 4.0, 5.5]])
def test_that_of_a_few_runs_is_as_well(values):
    n = len(values)
    want = quantile(0.95, n - 1) * statistics.stdev(values) / math.sqrt(n)
    assert half_width(values) == pytest.approx(want)
    assert half_width(values[:1]) == half_width([*values, INF]) == INF
    mean, low, high = geometric([math.exp(x) for x in values])
    middle = statistics.fmean(values)
    assert math.log(mean) == pytest.approx(middle)
    assert math.log(low) == pytest.approx(middle - want)
    assert math.log(high) == pytest.approx(middle + want)


def test_each_end_has_half_of_the_chance_to_fail():
    x = torch.rand(20, generator=seeded(), dtype=torch.float64)
    assert len(x) < FEWEST  # no normal theory
    alpha = 0.08
    want = (lower(x, alpha / 2), 1 - lower(1 - x, alpha / 2))
    got = expectation(x, 1 - alpha, Known(0.0, 1.0)).interval
    assert (got.low, got.high) == pytest.approx(want)
    got = bounded(x, 1.0, 1 - alpha)
    assert (got.low, got.high) == pytest.approx(want)


def test_an_entropy_counts_what_lies_beyond_its_cut():
    # p (-log p - c) <= exp(-c - 1), so that N responses have at most N exp(-c - 1) = 1 / (e n).
    n, log_count, alpha = 12, math.log(50), 0.1
    log_pi = -0.2 * torch.rand(n, generator=seeded(), dtype=torch.float64)
    cut = log_count + math.log(n)
    got = entropy_expectation(log_pi, log_count, 1 - alpha)
    high = cut - lower(cut + log_pi, alpha / 2) + 1 / (math.e * n)
    assert high < log_count
    assert got.high == pytest.approx(high)
    assert got.low == pytest.approx(lower(-log_pi, alpha / 2))


def test_the_two_bounds_of_a_ratio_fail_together_as_often_as_one_end():
    n, alpha, most = 20, 0.1, 4.0
    x = torch.rand(n, generator=seeded(1), dtype=torch.float64)
    weight = 1 + 2 * torch.rand(n, generator=seeded(2), dtype=torch.float64)
    known = Known(0.0, elsewhere=x[:2], masses=torch.ones(2).double(), above="unknown")
    got = ratio_expectation(x, weight, most, 1 - alpha, known, weight[:2]).interval
    want = lower(x, alpha / 2) / (most - lower(most - weight, alpha / 2))
    assert got.low == pytest.approx(want)
    assert got.high == INF


def test_log_z_shares_its_chance_between_all_its_bounds():
    log_w, targets, base = (
        torch.randn(200, generator=seeded(seed), dtype=torch.float64) for seed in (1, 2, 3)
    )
    top, alpha = 4.0, 0.08
    none = log_z_limits(log_w, alpha)
    assert float(none[0]) == pytest.approx(float(betting_lower(log_w, alpha)))
    assert float(none[1]) == INF
    low = float(betting_lower(log_w, alpha / 2))
    by_target = {a: -float(betting_lower(-targets, a)) for a in (alpha / 2, alpha / 4)}
    by_base = {a: float(betting_upper(base, top, a)) for a in (alpha / 2, alpha / 4)}
    for shift in (-6.0, 0.0, 6.0):  # either bound, the first or the second, is the sharper one
        more = {"target_log_w": targets + shift}
        moved = by_target[alpha / 2] + shift, by_target[alpha / 4] + shift
        one = log_z_limits(log_w, alpha, **more)
        assert [float(x) for x in one] == pytest.approx([low, moved[0]])
        both = log_z_limits(log_w, alpha, **more, log_w_max=top, base_log_w=base)
        want = min(moved[1], by_base[alpha / 4], top)
        assert [float(x) for x in both] == pytest.approx([low, want])
    other = log_z_limits(log_w, alpha, log_w_max=top, base_log_w=base)
    assert float(other[1]) == pytest.approx(by_base[alpha / 2])


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_the_prompts_of_a_report_fail_together_as_often_as_it_says(prompts):
    space = rl_ebm.TokenSpace(3, 2)
    scores = torch.randn(prompts, space.num_sequences, generator=seeded(4))
    ebm = rl_ebm.EBM(space, scores, prompts=[[i] for i in range(prompts)])
    solution, policy = rl_ebm.solve(ebm), Tabular(space, ebm.prompts, 1.0, seeded(5))
    found = verify_sampled(policy, solution, 50, 0.9, seeded(6))
    intervals = found.intervals()
    for name in ("tv", "js", "kl_target_policy", "kl_policy_target", "expected_reward_policy"):
        assert intervals[name].confidence == pytest.approx(0.9)
    assert min(x.confidence for x in intervals.values()) == pytest.approx(0.9)
    drawn = rl_ebm.certify(policy, ebm, 50, 0.9, generator=seeded(6))
    assert {drawn.log_z.confidence, drawn.elbo.confidence} == {0.9}
    for part in drawn.per_prompt:
        assert part.log_z.confidence == pytest.approx(1 - 0.1 / prompts)


def test_the_fewest_samples_are_enough():
    for n, words in ((FEWEST - 1, "too few to see the tail"), (FEWEST, "")):
        x = torch.linspace(0, 1, n, dtype=torch.float64)
        half = sample_interval(x, 0.95).high - 0.5
        assert words in (found := upper_doubt(x, half, 0.05))
        assert bool(found) == bool(words)
