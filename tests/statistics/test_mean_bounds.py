"""Bounds on a mean: against slow definitions, at their limits, and how often they fail.

The laws are enumerated: m is known exactly, and the 1,000 repetitions are rows of one tensor.
A bound may fail in a share alpha of the repetitions; the test fails beyond the 99.9% quantile of
Binomial(1000, alpha). Bounds are looser than they claim, so that a wrong alpha need not show
there: it does in the closed forms.
"""

from __future__ import annotations

import math

import pytest
import torch
from certificate_cases import LAWS, REPETITIONS, closed_wealth_bound, draw, most_misses
from toy_policies import close, seeded

from rl_ebm.statistics import mean_bounds
from rl_ebm.statistics.mean_bounds import (
    betting_lower,
    betting_upper,
    effective_sample_size,
    log_mean,
    stakes,
)

INF = math.inf


# How often they fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("law", LAWS)
def test_lower_bounds_hold_as_often_as_they_say(law, n, alpha):
    log_x, log_m = draw(law, REPETITIONS, n)
    misses = int((betting_lower(log_x, alpha) > log_m).sum())
    assert misses <= most_misses(alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("n", [1, 7, 100])
@pytest.mark.parametrize("law", LAWS)
def test_upper_bounds_hold_as_often_as_they_say(law, n, alpha):
    log_x, log_m = draw(law, REPETITIONS, n)
    log_max = LAWS[law].log_x.max().item()
    misses = int((betting_upper(log_x, log_max, alpha) < log_m).sum())
    assert misses <= most_misses(alpha)


# How close they come -----------------------------------------------------------------------------


def test_bounds_are_close_on_an_easy_law():
    log_x, log_m = draw("easy", 20, 1000)
    log_max = LAWS["easy"].log_x.max().item()
    assert 0 < float((log_m - betting_lower(log_x, 0.05)).mean()) < 0.1
    assert 0 < float((betting_upper(log_x, log_max, 0.05) - log_m).mean()) < 0.15


def test_betting_closes_in_as_samples_grow():
    gaps = [float((m - betting_lower(x, 0.05)).mean()) for x, m in _easy_draws([50, 500, 5000])]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def _easy_draws(sizes):
    return [draw("easy", 10, n) for n in sizes]


# Against slow definitions ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_betting_is_the_root_of_its_wealth(n):
    log_x, _ = draw("heavy", 3, n)
    log_x = log_x + 400  # nothing of the size of X is ever a float
    for row in log_x:
        want = closed_wealth_bound((row - 400).tolist(), stakes(n).tolist(), 0.05)
        assert float(betting_lower(row, 0.05)) - 400 == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.4])
def test_betting_on_one_sample_has_a_closed_form(alpha):
    bet = float(stakes(1).mean())
    want = math.log(bet / (1 / alpha - 1 + bet))
    assert float(betting_lower(torch.tensor([7.0]), alpha)) == pytest.approx(7 + want, abs=1e-8)


def test_wealth_counts_when_it_was_highest():
    # Ville: later losses take nothing back.
    start = torch.full((20,), 3.0).double()
    then = torch.full((20,), -INF).double()
    bound = betting_lower(torch.cat([start, then]), 0.05)
    assert float(bound) > float(betting_lower(torch.cat([then, start]), 0.05)) + 0.1


def test_upper_bounds_are_never_above_the_maximum():
    log_x = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 0.0], [-0.1, -0.2, -9.0]]).double()
    assert bool((betting_upper(log_x + 50, 50.0, 0.05) <= 50).all())


def test_betting_upper_where_nothing_was_met():
    # X = 0 only: the whole stake wins 1 / (1 - m) each time, and the others less.
    n, alpha = 50, 0.05
    bound = betting_upper(torch.full((n,), -INF), 0.0, alpha).exp()
    assert 1 - alpha ** (1 / n) < float(bound) < 1 - (alpha / len(stakes(n))) ** (1 / n) + 1e-9


# Limits -----------------------------------------------------------------------------------------


def test_bounds_move_with_a_constant_factor():
    log_x, _ = draw("easy", 4, 30)
    close(betting_lower(log_x + 700, 0.05) - 700, betting_lower(log_x, 0.05), 1e-8)


def test_zeros_bound_nothing_and_hurt_no_neighbour():
    log_x, _ = draw("easy", 2, 30)
    log_x[0] = -INF
    bound = betting_lower(log_x, 0.05)
    assert bound.tolist() == [-INF, bound[1].item()]
    assert math.isfinite(bound[1])


@pytest.mark.parametrize("first", [-INF, 0.0])
def test_a_few_zeros_are_samples_like_others(first):
    log_x = torch.zeros(40).double()
    log_x[0] = first
    assert -0.4 < float(betting_lower(log_x, 0.05)) < 0


def test_rows_are_separate_problems():
    log_x, _ = draw("heavy", 6, 20)
    rows = torch.stack([betting_lower(row, 0.1) for row in log_x])
    close(betting_lower(log_x.view(2, 3, 20), 0.1), rows.view(2, 3))


def test_long_samples_are_averaged_in_blocks(monkeypatch):
    monkeypatch.setattr(mean_bounds, "MAX_BETS", 10)
    log_x = torch.randn(35, generator=seeded(6), dtype=torch.float64)
    blocks = log_x[:32].view(8, 4).exp().mean(1).log()
    close(betting_lower(log_x, 0.05), betting_lower(blocks, 0.05), 1e-8)


def test_effective_sample_size():
    close(effective_sample_size(torch.full((3, 8), 500.0).double()), torch.full((3,), 8.0).double())
    one = torch.tensor([-INF, 900.0, -900.0]).double()
    close(effective_sample_size(one), torch.tensor(1.0).double())
    close(effective_sample_size(torch.tensor([1.0, 3.0]).log()), torch.tensor(1.6), 1e-6)
    assert float(effective_sample_size(torch.full((4,), -INF))) == 0
    close(log_mean(torch.tensor([800.0, -INF])), torch.tensor(800 - math.log(2)))


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [betting_lower, lambda x, a: betting_upper(x, 9.0, a)])
def test_wrong_arguments(bound):
    with pytest.raises(ValueError, match="alpha must be in"):
        bound(torch.zeros(20), 1.0)
    with pytest.raises(ValueError, match="NaN or"):
        bound(torch.full((20,), math.nan), 0.1)
    with pytest.raises(ValueError, match="NaN or"):
        bound(torch.full((20,), INF), 0.1)
    with pytest.raises(ValueError, match="at least one sample"):
        bound(torch.zeros(0), 0.1)


def test_wrong_maxima():
    with pytest.raises(ValueError, match="it is no bound"):
        betting_upper(torch.ones(3), 0.5, 0.1)
    with pytest.raises(ValueError, match="log_max must be finite"):
        betting_upper(torch.ones(3), INF, 0.1)
    # One sample: nothing above the maximum.
    assert float(betting_upper(torch.zeros(1), 0.0, 0.1)) <= 0
