"""Intervals where all responses are listed: a class that the samples may well miss is known."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from certificate_cases import most_misses
from interval_cases import Case, light, truth_of
from toy_policies import seeded

import rl_ebm
from rl_ebm.certificates import weights as sampler
from rl_ebm.policies import Tabular, Uniform, detours
from rl_ebm.statistics.expectations import Known, expectation, ratio_expectation
from rl_ebm.statistics.tails import is_normal, skewness
from rl_ebm.verification.along_samples import verify_sampled
from rl_ebm.verification.verify import verify_listed

INF = math.inf
REPETITIONS = 40


def peaked() -> Case:
    """A policy of one response, and another of 1.6% that is 15 nats better."""
    space = rl_ebm.TokenSpace(3, 5, eos_id=0)
    scores = -8 * torch.randn(space.num_sequences, generator=seeded(5), dtype=torch.float64).exp()
    policy = Tabular(space, scale=3.0, generator=seeded(5))
    return Case(rl_ebm.EBM(space, rl_ebm.rewards.Table(scores), reference=Uniform(space)), policy)


def held(missed: Counter[str], repetitions: int = REPETITIONS) -> dict[str, int]:
    most = most_misses(0.05, repetitions)
    return {name: count for name, count in missed.items() if count > most}


def misses(interval, truth):
    # Sums of the enumeration are rounded.
    return not interval.low - 1e-9 <= truth <= interval.high + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("listed", "repetitions"), [(True, REPETITIONS), (False, 24)])
def test_certificates_know_what_fifty_samples_miss(listed, repetitions, monkeypatch):
    if not listed:
        monkeypatch.setattr(sampler, "are_listed", lambda *_: False)
    case = peaked()
    truth, missed, kinds = truth_of(case), Counter(), Counter()
    for seed in range(repetitions):
        got = rl_ebm.certify(case.policy, case.ebm, 50, generator=seeded(seed))
        for name in ("log_z", "elbo", "kl_policy_target", "expected_reward_policy"):
            missed[name] += misses(getattr(got, name), truth[name])
        missed["entropy_policy"] += misses(got.entropy_policy, truth["entropy_policy"])
        kinds[got.elbo.kind] += 1
    assert held(missed, repetitions) == {}
    assert not listed or kinds == {"finite-sample": repetitions}


def one_far_off(sign: int, share: float = 0.012) -> Case:
    """One of 16 responses, unseen by 55% of samples of 50, moves the mean by most of a half-width.

    E R is off by 0.85 of 2 / sqrt(50), in units of the standard deviation of the other rewards.
    """
    space = rl_ebm.TokenSpace(16, 1)
    others = torch.linspace(-1, 1, 15, dtype=torch.float64)
    far = torch.tensor([0.85 * 2 / math.sqrt(50) / share], dtype=torch.float64)
    rewards = sign * torch.cat([far, others / others.std(correction=0)])
    logits = torch.zeros(1, 16, dtype=torch.float64)
    logits[0, 0] = math.log(15 * share / (1 - share))
    return Case(rl_ebm.EBM(space, rewards, 5.0), Tabular.from_tables([logits], space))


@pytest.mark.parametrize("sign", [1, -1])
def test_that_is_seen_by_verification_and_certificates(sign):
    case = one_far_off(sign)
    truth = truth_of(case)["expected_reward_policy"]
    for seed in range(2):
        report = verify_sampled(case.policy, rl_ebm.solve(case.ebm), 50, generator=seeded(seed))
        certificate = rl_ebm.certify(case.policy, case.ebm, 50, generator=seeded(seed))
        for got in (report, certificate):
            interval = got.expected_reward_policy
            assert interval.kind == "finite-sample"
            assert not misses(interval, truth)
            assert interval.width < abs(interval.estimate - truth) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_a_class_that_moves_the_mean_by_less_than_the_half_width(sign):
    case, repetitions = one_far_off(sign), 80
    solution = rl_ebm.solve(case.ebm)
    report = verify_listed(case.policy, solution)
    truth, missed, figures = report.scalars(), Counter(), truth_of(case)
    for seed in range(repetitions):
        got = verify_sampled(case.policy, solution, 50, generator=seeded(seed))
        for name, interval in got.intervals().items():
            if name in truth:
                missed[name] += misses(interval, truth[name])
        certificate = rl_ebm.certify(case.policy, case.ebm, 50, generator=seeded(seed))
        for name in ("elbo", "expected_reward_policy", "kl_policy_target"):
            interval = getattr(certificate, name)
            missed[f"certificate {name}"] += misses(interval, figures[name])
    assert len(missed) > 8
    assert held(missed, repetitions) == {}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.3, 0.02, 1e-3])
def test_either_end_holds_for_a_class_of_any_size(share, sign):
    law, p = torch.tensor([0.0, 0.1, 9.0]).double() * sign, torch.zeros(3).double()
    p[:] = torch.tensor([(1 - share) / 2, (1 - share) / 2, share])
    known = Known(elsewhere=law, masses=p, listed=True, unit=1.0)
    truth, missed = float(p @ law), Counter()
    for seed in range(REPETITIONS):
        drawn = torch.multinomial(p, 50, replacement=True, generator=seeded(seed))
        got = expectation(law[drawn], 0.95, known).interval
        missed["mean"] += misses(got, truth)
        # A class of 30% is met often enough, the others are not.
        assert got.kind == ("asymptotic" if share == 0.3 else "finite-sample")
        weight = torch.tensor([1.0, 1.0, 3.0]).double()
        got = ratio_expectation(
            law[drawn].abs(), weight[drawn], 3.0, 0.95, _positive(known), weight
        ).interval
        missed["ratio"] += misses(got, float(p @ law.abs() / (p @ weight)))
    assert held(missed) == {}


def _positive(known):
    return Known(0.0, 9.0, known.elsewhere.abs(), known.masses, listed=True, unit=1.0)


def test_a_ratio_is_not_bounded_by_what_bounds_its_numerator():
    # E x / E weight = 1 / 2 with x = 1.
    x, weight, p = torch.ones(2).double(), torch.tensor([1.0, 3.0]).double(), torch.ones(2) / 2
    known = Known(1.0, 1.0, x, p.double(), listed=True, unit=1.0)
    drawn = torch.tensor([0, 1] * 30)
    got = ratio_expectation(x[drawn], weight[drawn], 3.0, 0.95, known, weight).interval
    assert got.low < 0.5 < got.high
    got = ratio_expectation(x[drawn[:10]], weight[drawn[:10]], 3.0, 0.95, known, weight).interval
    assert got.low < 0.5 < got.high < 0.501


def test_the_skewness_of_a_law_is_that_of_its_values_as_often():
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    x = torch.tensor([1.0, 4.0, -2.0]).double()
    want = skewness(x.repeat_interleave((10 * p).round().long()))
    assert skewness(x, p) == pytest.approx(want)
    # Bernoulli: (1 - 2 p) / sqrt(p (1 - p)), which is 3 at p = (1 - 3 / sqrt(13)) / 2.
    small = (1 - 3 / math.sqrt(13)) / 2
    two, law = torch.tensor([0.0, 1.0]).double(), torch.tensor([1 - small, small]).double()
    assert skewness(two, law) == pytest.approx(3.0)
    assert [is_normal(two, law, n, 0.0) for n in (224, 226)] == [False, True]
    assert [is_normal(-two, law, n, 0.0) for n in (224, 226)] == [False, True]
    assert not is_normal(two, law, 226, 1.0)
    assert not is_normal(two, torch.ones(2).double() / 2, 29, 0.0)


def test_light_laws_keep_the_interval_of_their_sample():
    case = light()
    assert detours.are_listed(case.ebm.space, 100)
    got = rl_ebm.certify(case.policy, case.ebm, 100, generator=seeded())
    assert got.elbo.kind == got.expected_reward_policy.kind == got.entropy_policy.kind
    assert got.elbo.kind == "asymptotic"
    assert got.elbo.low < got.elbo.estimate < got.elbo.high
