"""Random losses end where the audit says: noisy training on batches that the sampler draws."""

from __future__ import annotations

import pytest
import torch

import rl_ebm
from benchmarks.support.loss_training import Plan, statistics, train
from benchmarks.support.random_losses import draw

PLAN = Plan(seeds=4, first=160, last=120, small=96, large=384)
INSIDE = [2, 8, 10, 15, 33]
"""of benchmarks.losses: each kind, penalties in the loss and in the reward, inner steps, a clamp"""


def limit_of(case):
    found = rl_ebm.audit_loss(
        case.loss, rl_ebm.solve(case.ebm), case.kind, beyond=False, **case.arguments
    )
    return found.degenerate, found.log_laws[0].exp()


@pytest.mark.slow
def test_random_losses_end_where_the_audit_says():
    kinds = set()
    for seed in INSIDE:
        case = draw(seed)
        degenerate, law = limit_of(case)
        assert not degenerate
        end = train(case, PLAN, seed + 1000)
        for x in statistics(case, end, law):
            assert x.agrees, (case.words, x)
        kinds.add(case.kind)
    assert len(kinds) == 3
    case = draw(4)
    degenerate, law = limit_of(case)
    assert degenerate
    end = train(case, PLAN, 1004)
    dead = law == 0
    assert bool(dead.any())
    assert not bool(dead.all())
    assert float(end.last.exp()[:, dead].max()) < 1e-2
    assert torch.equal(
        end.last[:, dead].max(1).values < end.before[:, dead].max(1).values,
        torch.ones(len(end.last), dtype=torch.bool),
    )
