"""What is exactly true of two EBMs that pay differently for a phrase, against every prefix."""

from __future__ import annotations

import pytest
import torch

import rl_ebm
from benchmarks.readme.large import FIGURES, HIGH, Options, Truth, balance, measure, target
from benchmarks.readme.scale import hidden_reference


def test_truth_is_that_of_every_prefix():
    space = rl_ebm.TokenSpace(18, 4)
    reference = hidden_reference(space, 3)
    log_z = [float(rl_ebm.solve(target(space, reference, s)).log_z) for s in (None, HIGH)]
    even = balance(*log_z, HIGH)
    solution, policy = (
        rl_ebm.solve(target(space, reference, pay)) for pay in (even + 2.0, even - 0.5)
    )
    truth = Truth(*(1 / (1 + torch.tensor(-x).double().exp().item()) for x in (2.0, -0.5)))
    report = rl_ebm.verify(policy, solution)
    assert report.mode != "sampled"
    for name in FIGURES:
        assert getattr(report, name) == pytest.approx(getattr(truth, name), rel=1e-6)


@pytest.mark.slow
def test_intervals_hold_the_truth():
    found = measure(
        Options(
            vocab_size=200,
            max_length=10,
            hidden=3,
            samples=60,
            confidence=0.999,
            device="cpu",
            threads=1,
        )
    )
    for name in FIGURES:
        interval = getattr(found.report, name)
        assert interval.low <= getattr(found.truth, name) <= interval.high, name
        assert interval.low > 0
