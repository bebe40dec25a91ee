"""What no loss may do gets one sentence, and what is extreme the right answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.fixed_points.finite import group_advantages
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses.contract import LossError


def solved(shape=(3, 2, None), beta=0.7, scale=1.0):
    space = rl_ebm.TokenSpace(*shape)
    reference = Tabular(space, scale=0.8, generator=seeded(3), dtype=torch.float64)
    scores = torch.randn(space.num_sequences, generator=seeded(4), dtype=torch.float64)
    return rl_ebm.solve(rl_ebm.EBM(space, scale * scores, beta, reference))


EOS = solved((3, 3, 2))


def mean(x, mask):
    return (x * mask).sum(1).mean()


def plain(p, old, ref, a, mask):
    return mean(-p * a, mask)


def squared(beta):
    return lambda p, old, ref, a, mask: mean(-p * a + beta * (p - ref).square() / 2, mask)


def paid(beta, after=lambda x: x):
    return lambda r, old, ref, mask: after(r - beta * ((old - ref) * mask).sum(1))


def audit(loss, solution=EOS, kind="policy-gradient", **options):
    return rl_ebm.audit_loss(loss, solution, kind, beyond=False, **options)


def writes(p, old, ref, a, mask):
    a -= a.mean()
    return mean(-p * a, mask)


def forgets(p, old, ref, a, mask):
    mask[:, 0] = False
    return mean(-p * a, mask)


GENERATOR = torch.Generator()
WRONG = {
    "nan": (lambda p, o, r, a, m: mean(p * a, m) * float("nan"), "the loss is nan"),
    "nan gradient": (
        lambda p, o, r, a, m: mean(-p * a + (p * 0).sqrt(), m),
        "gradient that is NaN or infinite",
    ),
    "later nan": (lambda p, o, r, a, m: mean(-(p + 3).log() * a, m), "the loss is nan"),
    "writes": (writes, "writes into advantages"),
    "writes mask": (forgets, "writes into mask"),
    "random": (lambda p, o, r, a, m: mean(-p * a * torch.rand(()), m), "random numbers"),
    "random, numpy's": (
        lambda p, o, r, a, m: mean(-p * a * np.random.default_rng().random(), m),
        "two values",
    ),
    "random, its own": (
        lambda p, o, r, a, m: mean(-p * a * torch.rand((), generator=GENERATOR), m),
        "two values",
    ),
    "rows": (lambda p, o, r, a, m: (p * a * m).sum(1), r"one of shape \(6,\)"),
    "item": (lambda p, o, r, a, m: mean(-p * a, m).item(), "must return one number"),
    "pair": (lambda p, o, r, a, m: (mean(-p * a, m), {}), "got tuple"),
    "detached": (lambda p, o, r, a, m: mean(-p.detach() * a, m), "does not depend on log_pi"),
    "ignored": (lambda p, o, r, a, m: mean(-o * a, m), "does not depend on log_pi"),
    "shut there": (
        lambda p, o, r, a, m: mean(-p * a * ((p - r).abs() > 50), m),
        "near the reference's: its gradient is 0 there",
    ),
    "no mask": (lambda p, o, r, a, m: -p.mean(), "past the end of a response"),
    "whitened": (
        lambda p, o, r, a, m: mean(-p * (a - a.mean()) / (a.std() + 1e-8), m),
        "couples the rows of a batch",
    ),
    "longest row": (lambda p, o, r, a, m: mean(-p * a, m) / m.sum(1).max(), "couples the rows"),
    "root of B": (lambda p, o, r, a, m: (-p * a * m).sum() / len(m) ** 0.5, "couples the rows"),
    "bfloat16": (
        lambda p, o, r, a, m: squared(0.7)(*(x.bfloat16() for x in (p, o, r, a)), m),
        "less than float32",
    ),
    "arguments": (lambda p, o, r, a: mean(-p * a, 1.0), "is called as loss"),
    "fails": (lambda p, o, r, a, m: {}["x"], "KeyError"),
    "shapes": (lambda p, o, r, a, m: mean(-p.view(-1, 4, 3) * 1, m), "fails on inputs of shapes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_cannot_be_audited_gets_one_sentence(name):
    loss, said = WRONG[name]
    with pytest.raises(LossError, match=said) as found:
        audit(loss)
    assert "\n" not in str(found.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA says so")
def test_a_loss_that_needs_cuda():
    with pytest.raises(LossError, match="needs a CUDA device"):
        audit(lambda p, o, r, a, m: mean(-p * a, m).cuda())


@pytest.mark.parametrize(
    ("advantages", "said"),
    [
        (lambda r, o, f, m: r - r.median(), "couples the responses"),
        (lambda r, o, f, m: (r - r.mean())[:, None] * m, "couples the responses"),
        (lambda r, o, f, m: r + torch.rand(len(r)), "two answers for the same"),
        (lambda r, o, f, m: r[:, None], r"got \(6, 1\)"),
        (lambda r, o, f, m: r * float("nan"), "NaN or infinite"),
        (lambda r, o, f, m: r.tolist(), "got list"),
        (lambda r, o, f: r, "TypeError"),
    ],
)
def test_advantages_that_cannot_be_audited(advantages, said):
    with pytest.raises(LossError, match=said):
        audit(squared(0.7), advantages=advantages)


@pytest.mark.slow
@pytest.mark.parametrize(
    "after",
    [lambda x: x, lambda x: x - x.mean(), lambda x: (x - x.mean()) * len(x) / max(len(x) - 1, 1)],
    ids=["none", "centred", "leave-one-out"],
)
def test_a_penalty_in_the_reward_ends_at_the_ebm_however_it_is_centred(after):
    found = audit(plain, advantages=paid(0.7, after))
    assert found.is_target
    assert found.tv < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "beta"), [(1e-6, 0.7), (1e4, 1e4), (1e3, 1e3), (1e-6, 1e-6), (1.0, 0.03)]
)
def test_rewards_of_every_scale_end_at_the_ebm(scale, beta):
    found = audit(plain, solved(scale=scale, beta=beta), advantages=paid(beta))
    assert found.is_target
    assert found.degenerate is False
    assert found.how == "flow"


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "beta"), [(1e4, 0.7), (1.0, 1e-2)])
def test_what_is_too_rare_for_float64_is_not_said_to_die(scale, beta):
    found = audit(plain, solved(scale=scale, beta=beta), advantages=paid(beta))
    assert found.tv < 1e-8
    assert found.degenerate is None
    assert found.is_target is None


def test_scores_in_float32_without_a_reference_end_at_the_ebm():
    scores = torch.randn(9, generator=seeded(1))
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(3, 2), scores, 0.7)
    found = audit(plain, rl_ebm.solve(ebm), advantages=paid(0.7))
    assert found.is_target
    law = torch.log_softmax(scores.double() / 0.7, 0)
    assert float((found.log_laws[0] - law).abs().max()) < 1e-10


@pytest.mark.slow
def test_without_a_penalty_it_dies_in_a_cold_ebm_as_well():
    assert audit(plain, solved(beta=0.05)).degenerate
    found = audit(plain, solved(beta=0.03))
    assert found.degenerate
    assert found.is_target is False


@pytest.mark.slow
def test_inner_steps_lose_nothing_beside_large_logits():
    """Without a restoring force a response dies: differences of logits used to round that away."""

    def loss(p, old, ref, a, mask):
        return mean(-(p - old).exp() * a, mask)

    found = audit(loss, solved((2, 2, None)), inner_steps=3, lr=0.1)
    assert found.degenerate
    assert found.survivors["responses"] == 1


def test_groups_that_are_alike_have_no_advantage():
    """Two values, one of which others never have: (g - mean) / std of equal numbers is 0."""
    g = torch.tensor([0.1, 0.7], dtype=torch.float64)
    log_law = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    for size in range(2, 9):
        found = group_advantages(log_law, g, size, 1e-12)
        # One of 0.7 among size - 1 of 0.1: its z is (size - 1) / sqrt(size), by Bessel's std.
        assert float(found[0]) == 0.0
        assert float(found[1]) == pytest.approx((size - 1) / size**0.5, rel=1e-9)


@pytest.mark.slow
def test_a_float32_loss_is_followed_as_far_as_it_goes():
    exact = audit(squared(0.7))
    rough = audit(lambda p, o, r, a, m: squared(0.7)(*(x.float() for x in (p, o, r, a)), m))
    assert rough.tv == pytest.approx(exact.tv, abs=1e-4)
    assert rough.accuracy > 1e-8
