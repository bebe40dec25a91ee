"""The ends of the certificates: how often they fail, and who gets how much of alpha.

As in test_mean_bounds: the laws are enumerated, the repetitions are rows of one tensor.
"""

from __future__ import annotations

import math

import pytest
import torch
from certificate_cases import LAWS, REPETITIONS, draw, draw_target, kls_of, most_misses
from toy_policies import close

from rl_ebm.certificates import log_z_interval, log_z_limits, sample_interval
from rl_ebm.statistics.interval import difference
from rl_ebm.statistics.mean_bounds import betting_lower, betting_upper

INF = math.inf

# How often they fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law",
    [x if x in ("heavy", "hidden") else pytest.param(x, marks=pytest.mark.slow) for x in LAWS],
)
def test_log_z_is_between_its_limits_as_often_as_claimed(law):
    alpha, n = 0.2, 60
    log_w, log_z = draw(law, REPETITIONS, n)
    target = draw_target(law, REPETITIONS, n)
    log_max = LAWS[law].log_x.max().item()
    base, _ = draw(law, REPETITIONS, n, seed=9)
    for others in (
        {},
        {"target_log_w": target},
        {"log_w_max": log_max, "base_log_w": base},
        {"target_log_w": target, "log_w_max": log_max, "base_log_w": base},
    ):
        low, high = log_z_limits(log_w, alpha, **others)
        assert int(((low > log_z) | (high < log_z)).sum()) <= most_misses(alpha)


def test_limits_are_close_on_an_easy_law():
    log_w, log_z = draw("easy", 5, 1000)
    low, high = log_z_limits(log_w, 0.05, draw_target("easy", 5, 1000))
    assert bool((log_z - 0.12 < low).all())
    assert bool((high < log_z + 0.12).all())


@pytest.mark.parametrize("law", ["easy", "heavy"])
@pytest.mark.slow
def test_divergences_are_in_their_intervals_as_often_as_claimed(law):
    repetitions, n, confidence = 200, 100, 0.8
    log_w, _ = draw(law, repetitions, n)
    target = draw_target(law, repetitions, n)
    want = kls_of(law)
    misses = [0, 0]
    for w, t in zip(log_w, target, strict=True):
        log_z = log_z_interval(w, 0.9, target_log_w=t)
        found = (
            difference(log_z, sample_interval(w, 0.9), least=0.0),
            difference(sample_interval(t, 0.9), log_z, least=0.0),
        )
        for i, interval in enumerate(found):
            assert interval.confidence == confidence
            misses[i] += not interval.low <= want[i] <= interval.high
    assert max(misses) <= most_misses(1 - confidence, repetitions)


# Who gets how much of alpha ----------------------------------------------------------------------


def test_alpha_is_shared_by_the_sides_and_the_bounds_that_there_are():
    log_w, _ = draw("heavy", 3, 50)
    target, (base, _) = draw_target("heavy", 3, 50), draw("heavy", 3, 50, seed=9)
    top = LAWS["heavy"].log_x.max().item()

    low, high = log_z_limits(log_w, 0.08)
    close(low, betting_lower(log_w, 0.08))
    assert high.tolist() == [INF] * 3

    low, high = log_z_limits(log_w, 0.08, target)
    close(low, betting_lower(log_w, 0.04))
    close(high, -betting_lower(-target, 0.04))

    low, high = log_z_limits(log_w, 0.08, log_w_max=top, base_log_w=base)
    close(low, betting_lower(log_w, 0.04))
    close(high, betting_upper(base, top, 0.04))

    low, high = log_z_limits(log_w, 0.08, target, top, base)
    close(low, betting_lower(log_w, 0.04))
    by_target, by_max = -betting_lower(-target, 0.02), betting_upper(base, top, 0.02)
    close(high, torch.minimum(by_target, by_max))

    (log_w, _), target = draw("easy", 3, 50), draw_target("easy", 3, 50)
    low, high = log_z_limits(log_w, 0.08, target, 9.0, log_w[:, :1])
    close(high, -betting_lower(-target, 0.02))

    low, high = log_z_limits(log_w, 0.08, log_w_max=top)
    close(low, betting_lower(log_w, 0.08))
    close(high, torch.full((3,), top, dtype=torch.float64))
