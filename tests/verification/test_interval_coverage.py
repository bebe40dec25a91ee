"""How often the intervals of certificates and of sampled verification hold the truth.

Over policies and targets that are hard to estimate; the truth is enumerated. What is claimed with
95% may be missed by no more than the 99.9% quantile of Binomial(repetitions, 0.05).
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from certificate_cases import most_misses
from interval_cases import CASES, impossible, long_tail, missed_branch, truth_of
from toy_policies import seeded

import rl_ebm
from rl_ebm.verification.along_samples import verify_sampled
from rl_ebm.verification.verify import verify_listed

INF = math.inf


def misses_of_certificates(case, n, repetitions):
    truth, missed, found = truth_of(case), Counter(), []
    solution = rl_ebm.solve(case.ebm)
    for seed in range(repetitions):
        target = solution.sample(n, seeded(10_000 + seed))
        got = rl_ebm.certify(case.policy, case.ebm, n, 0.95, target, generator=seeded(seed))
        found.append(got)
        for name in truth.keys() - {"mass_impossible"}:
            interval = getattr(got, name)
            # Sums of the enumeration are rounded.
            missed[name] += not interval.low - 1e-9 <= truth[name] <= interval.high + 1e-9
    return missed, found


def misses_of_verification(case, n, repetitions):
    solution = rl_ebm.solve(case.ebm)
    report = verify_listed(case.policy, solution)
    truth, missed, found = report.scalars(), Counter(), []
    for seed in range(repetitions):
        got = verify_sampled(case.policy, solution, n, 0.95, seeded(seed))
        found.append(got)
        for name, interval in got.intervals().items():
            if name in truth:
                missed[name] += not interval.low - 1e-9 <= truth[name] <= interval.high + 1e-9
        for mine, theirs in zip(got.per_depth, report.per_depth, strict=True):
            x = mine.mean_kl
            missed[f"depth {mine.depth}"] += not x.low - 1e-9 <= theirs.mean_kl <= x.high + 1e-9
    return missed, found


def allowed(missed, repetitions):
    most = most_misses(0.05, repetitions)
    return {name: count for name, count in missed.items() if count > most} == {}


@pytest.mark.slow
@pytest.mark.parametrize("n", [50])
@pytest.mark.parametrize("name", CASES)
def test_certificates_hold_as_often_as_they_say(name, n):
    missed, _ = misses_of_certificates(CASES[name](), n, 60)
    assert allowed(missed, 60), missed


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sampled_verification_holds_as_often_as_it_says(name):
    missed, _ = misses_of_verification(CASES[name](), 50, 40)
    assert allowed(missed, 40), missed


@pytest.mark.parametrize("name", ["missed_response", "heavy", "impossible", "rare_branch"])
def test_certificates_of_hard_cases(name):
    missed, _ = misses_of_certificates(CASES[name](), 100, 8)
    assert allowed(missed, 8), missed


@pytest.mark.parametrize("name", ["far_tail", "rare_branch"])
def test_sampled_verification_of_hard_cases(name):
    missed, found = misses_of_verification(CASES[name](), 50, 3)
    assert allowed(missed, 3), missed
    for report in found:
        kl = report.kl_target_policy
        assert (kl.high, kl.kind) == (INF, "one-sided finite-sample")
        assert any("kl_target_policy" in text for text in report.warnings)
        assert "warning: no end" in str(report)


def test_light_tails_keep_two_ends():
    _, certificates = misses_of_certificates(CASES["light"](), 400, 2)
    for got in certificates:
        for name in ("elbo", "eubo", "kl_policy_target", "kl_target_policy", "entropy_policy"):
            assert getattr(got, name).kind == "asymptotic", name
            assert math.isfinite(getattr(got, name).width), name
    _, reports = misses_of_verification(CASES["light"](), 400, 1)
    for name in ("kl_policy_target", "kl_target_policy"):
        assert getattr(reports[0], name).kind == "asymptotic"
        assert getattr(reports[0], name).width < 0.2


def test_what_is_never_drawn_is_not_taken_to_be_absent():
    # The policy never begins with 0: none of its samples, and hardly one of the target's, shows it.
    case = missed_branch(1e-4)
    target = rl_ebm.solve(case.ebm).sample(100, seeded())
    assert not bool((target.tokens[:, 0] == 0).any())
    got = rl_ebm.certify(case.policy, case.ebm, 100, 0.95, target, generator=seeded())
    truth = truth_of(case)
    assert got.eubo.low <= truth["eubo"] <= got.eubo.high


@pytest.mark.parametrize("function", [False, True])
def test_a_policy_that_may_be_impossible_is_infinitely_far(function):
    # None of 60 samples is impossible; that others are is seen all the same.
    case = impossible(1e-5, function)
    got = rl_ebm.certify(case.policy, case.ebm, 60, generator=seeded())
    assert (got.elbo.low, got.expected_reward_policy.low) == (-INF, -INF)
    assert got.kl_policy_target.high == INF
    if not function:
        report = verify_sampled(case.policy, rl_ebm.solve(case.ebm), 60, generator=seeded())
        assert report.mass_impossible.estimate == 0
        assert report.kl_policy_target.high == INF
        assert report.expected_reward_policy.low == -INF
        assert report.bounds.occupancy.high == INF


def test_the_tail_that_no_sample_shows_leaves_the_upper_end_open():
    case = long_tail(0.002, max_length=12)
    report = verify_sampled(case.policy, rl_ebm.solve(case.ebm), 50, generator=seeded())
    truth = verify_listed(case.policy, rl_ebm.solve(case.ebm))
    for name in ("kl_target_policy", "kl_policy_target"):
        interval = getattr(report, name)
        assert interval.low <= getattr(truth, name) <= interval.high, name
