"""What distillation compares of teacher and policy: parts of rows, and drawn tokens, by loops."""

from __future__ import annotations

import math

import pytest
import torch
from toy_policies import close, seeded

from rl_ebm.agents.on_policy_distillation import (
    drawn_token_loss,
    on_policy_distillation_loss,
    returns_to_go,
)
from rl_ebm.divergences import restricted, top_actions

KAPPA = {
    "k1": lambda u: u,
    "k2": lambda u: u * u / 2,
    "k3": lambda u: math.exp(-u) - 1 + u,
}
LENGTHS = torch.tensor([3, 1, 2])


def rows(seed, shape=(3, 3, 5)):
    return torch.log_softmax(torch.randn(shape, generator=seeded(seed), dtype=torch.float64), -1)


def of(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def js(p, q):
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (of(p, m) + of(q, m)) / 2


def part(p, kept, outside):
    found = [p[i] for i in kept]
    if outside == "renormalise":
        return [x / math.fsum(found) for x in found]
    return found if outside == "drop" else [*found, 1 - math.fsum(found)]


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("outside", ["renormalise", "drop", "bucket"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_the_top_tokens_are_compared_at_the_states_of_each_response(divergence, outside, whose):
    log_pi, log_teacher = rows(0), rows(1)
    got = on_policy_distillation_loss(log_pi, log_teacher, LENGTHS, divergence, 2, whose, outside)
    terms = []
    for b, n in enumerate(LENGTHS.tolist()):
        for t in range(n):
            p, q = log_teacher[b, t].exp().tolist(), log_pi[b, t].exp().tolist()
            source = p if whose == "teacher" else q
            kept = sorted(range(5), key=lambda i: -source[i])[:2]
            p, q = part(p, kept, outside), part(q, kept, outside)
            terms.append({"forward": of(p, q), "reverse": of(q, p), "js": js(p, q)}[divergence] / 3)
    assert float(got) == pytest.approx(math.fsum(terms), rel=1e-9)
    # What stands past the end is not read.
    dirty = log_pi.clone()
    dirty[1, 1:] = rows(7)[1, 1:]
    again = on_policy_distillation_loss(dirty, log_teacher, LENGTHS, divergence, 2, whose, outside)
    close(again, got, 0.0)


def test_of_equal_entries_the_lowest_ids_are_kept_and_all_of_a_small_row():
    x = torch.tensor([[0.0, 1.0, 1.0, 1.0], [3.0, 3.0, 0.0, -math.inf]])
    assert top_actions(x, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert top_actions(x, 9).all()
    log_p = rows(2, (4, 3))
    everything = torch.ones_like(log_p, dtype=torch.bool)
    for outside in ("renormalise", "drop"):
        close(restricted(log_p, everything, outside), log_p, 1e-12)
    assert bool(torch.isneginf(restricted(log_p, everything, "bucket")[:, -1]).all())


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", KAPPA)
def test_a_reward_weighs_log_pi_by_what_follows(k, discount):
    log_pi, log_teacher = rows(3)[..., 0], rows(4)[..., 0]
    moved = log_pi.clone().requires_grad_()
    loss = drawn_token_loss(moved, log_teacher, LENGTHS, k, "reward", discount=discount)
    (slope,) = torch.autograd.grad(loss, moved)
    total = 0.0
    for b, n in enumerate(LENGTHS.tolist()):
        paid = [KAPPA[k](float(log_pi[b, t] - log_teacher[b, t])) for t in range(n)]
        for t in range(3):
            after = math.fsum(discount ** (j - t) * paid[j] for j in range(t, n))
            assert float(slope[b, t]) == pytest.approx(after / 3 if t < n else 0.0, abs=1e-12)
            total += after * float(log_pi[b, t]) / 3 if t < n else 0.0
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("weight", ["none", "ratio"])
@pytest.mark.parametrize("k", KAPPA)
def test_an_estimate_in_the_loss_has_its_own_gradient_and_that_of_the_ratio(k, weight):
    log_pi, log_teacher = rows(5)[..., 0], rows(6)[..., 0]
    moved = log_pi.clone().requires_grad_()
    loss = drawn_token_loss(moved, log_teacher, LENGTHS, k, "loss", weight)
    (slope,) = torch.autograd.grad(loss, moved)
    total, step = 0.0, 1e-5
    for b, n in enumerate(LENGTHS.tolist()):
        for t in range(3):
            u = float(log_pi[b, t] - log_teacher[b, t])

            def value(x, u=u):
                return KAPPA[k](u + x) * (math.exp(x) if weight == "ratio" else 1.0) / 3

            want = (value(step) - value(-step)) / (2 * step) if t < n else 0.0
            assert float(slope[b, t]) == pytest.approx(want, abs=1e-8)
            total += value(0.0) if t < n else 0.0
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)


def test_returns_to_go_of_one_token_are_what_it_pays():
    x = torch.tensor([[2.0], [-1.0]])
    close(returns_to_go(x, 0.5), x, 0.0)
