"""A positive factor of a loss moves no limit, however small or large: of every kind, in and out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid, relu
from toy_policies import seeded

import rl_ebm
from rl_ebm.divergences import tv
from rl_ebm.policies import Tabular

BETA = 0.7


def solved():
    space = rl_ebm.TokenSpace(3, 2, eos_id=2)
    reference = Tabular(space, scale=0.8, generator=seeded(3), dtype=torch.float64)
    scores = torch.randn(space.num_sequences, generator=seeded(4), dtype=torch.float64)
    return rl_ebm.solve(rl_ebm.EBM(space, scores, BETA, reference))


def mean(x, mask):
    return (x * mask).sum(1).mean()


def squared(p, old, ref, a, mask):
    return mean(-p * a + BETA * (p - ref).square() / 2, mask)


def shared(p, old, ref, a, mask):
    """One count of tokens, and rows that add up beside it: gradients from two batches."""
    return mean(-p * a, mask) + BETA * ((p - ref).square() / 2 * mask).sum() / mask.sum()


def clipped(p, old, ref, a, mask):
    return mean(-(p - old).exp() * a + BETA * relu((p - ref).abs() - 0.2), mask)


def bare(p, old, ref, a, mask):
    return mean(-p * a, mask)


def forward(student, teacher, tokens, mask):
    gap = student.log_softmax(-1) - teacher.log_softmax(-1)
    kl = (student.softmax(-1) * gap.nan_to_num(0.0, 0.0, 0.0)).sum(-1)
    return mean(kl, mask) + 0.3 * mean(
        -student.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], mask
    )


def gap(chosen, rejected, chosen_ref, rejected_ref):
    return chosen - chosen_ref - rejected + rejected_ref


def dpo(*pair):
    return -logsigmoid(BETA * gap(*pair)).mean()


def hinge(*pair):
    return relu(1 - BETA * gap(*pair)).mean()


def down(*pair):
    own = BETA * (pair[0] - pair[2])
    return (torch.sigmoid(own) + torch.sigmoid(-BETA * gap(*pair))).mean()


CASES = {
    "squared": (squared, {}),
    "shared": (shared, {}),
    "along a kink": (clipped, {}),
    "leaves the inside": (bare, {}),
    "over a deviation": (squared, {"advantages": "group-std"}),
    "inner steps": (squared, {"inner_steps": 3}),
    "distillation": (forward, {"kind": "distillation", "sampler": "teacher"}),
    "student draws": (forward, {"kind": "distillation"}),
    "dpo": (dpo, {"kind": "preference"}),
    "hinge": (hinge, {"kind": "preference"}),
    "pairs that die": (down, {"kind": "preference"}),
    "own pairs": (dpo, {"kind": "preference", "sampler": "policy"}),
}


QUICK = ("squared", "student draws", "dpo")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("factor", [1e-15, pytest.param(1e15, marks=SLOW)])
@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=SLOW) for x in CASES])
def test_a_factor_moves_no_limit(name, factor):
    loss, options = CASES[name]
    solution = solved()
    once, scaled = (
        rl_ebm.audit_loss(lambda *x, c=c: c * loss(*x), solution, beyond=False, **options)
        for c in (1.0, factor)
    )
    near = 1e-8 if once.how == "flow" else 10 * max(once.accuracy, scaled.accuracy)
    assert float(tv(once.log_laws[0], scaled.log_laws[0])) <= near
    for key in ("degenerate", "is_target", "depends_on_sampler", "combines", "how"):
        assert getattr(once, key) == getattr(scaled, key), key
    norms = [x.gradient_at_target["norm"] for x in (once, scaled)]
    assert norms[1] == pytest.approx(factor * norms[0], rel=1e-6)


@SLOW
@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_a_factor_moves_nothing_beyond_the_limit(factor):
    """Late and rounded samplers, groups, clips and roots; variances go by its square."""
    solution = solved()
    once, scaled = (
        rl_ebm.audit_loss(lambda *x, c=c: c * squared(*x), solution) for c in (1.0, factor)
    )
    assert once.clipped == pytest.approx(scaled.clipped)
    assert once.other_roots == pytest.approx(scaled.other_roots)
    for table in ("groups", "sampler"):
        for key, known in getattr(once, table).items():
            assert getattr(scaled, table)[key]["tv"] == pytest.approx(known["tv"], abs=1e-7), key
    for where, known in once.variance.items():
        assert scaled.variance[where]["one"] == pytest.approx(factor**2 * known["one"])
