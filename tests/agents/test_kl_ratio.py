"""A penalty in the loss times pi / pi_old: its value, its gradient, and where it ends."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, gradient, log_probs, unclipped
from fixed_point_cases import problem_of, small_ebm
from toy_policies import close, responses, seeded

from rl_ebm.agents import AGENTS
from rl_ebm.agents.ppo import GRPOConfig, clipped_loss
from rl_ebm.agents.shared.kl_penalty import PenaltyOptions, kl_terms
from rl_ebm.divergences import tv
from rl_ebm.fixed_points import Penalty, penalised, penalised_in_groups

KAPPA = {
    "k1": lambda u: u,
    "k2": lambda u: u * u / 2,
    "k3": lambda u: math.exp(-u) - 1 + u,
}
RATIO = {"kl_in": "loss", "kl_weight": "ratio"}
levels = pytest.mark.parametrize("level", ["token", "sequence"])


@levels
@pytest.mark.parametrize("k", KAPPA)
def test_the_penalty_is_multiplied_by_the_ratio_of_the_token_or_of_the_response(k, level):
    g = seeded(3)
    log_pi, old, log_ref = (-torch.rand(5, 3, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([3, 2, 1, 3, 2])
    options = PenaltyOptions(kl_estimator=k, kl_level=level, **RATIO)
    got = kl_terms(log_pi, log_ref, lengths, options, old).sum(1)
    for b, n in enumerate(lengths.tolist()):
        u = [float(log_pi[b, t] - log_ref[b, t]) for t in range(n)]
        rho = [float(log_pi[b, t] - old[b, t]) for t in range(n)]
        if level == "sequence":
            u, rho = [sum(u)], [sum(rho)]
        want = sum(math.exp(r) * KAPPA[k](x) for r, x in zip(rho, u, strict=True))
        assert float(got[b]) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("k", KAPPA)
def test_the_clipped_loss_has_the_gradient_of_the_ratio_as_well(k):
    g = seeded(5)
    log_pi, old, log_ref = (-torch.rand(4, 2, generator=g, dtype=torch.float64) for _ in range(3))
    options = GRPOConfig(kl_estimator=k, kl_weight="ratio")
    nothing, lengths = torch.zeros(4, dtype=torch.float64), torch.full((4,), 2)
    moved = log_pi.clone().requires_grad_()
    loss = clipped_loss(moved, old, log_ref, nothing, lengths, options)
    (got,) = torch.autograd.grad(loss, moved)
    step = 1e-6
    for b in range(4):
        for t in range(2):

            def value(x, b=b, t=t):
                ratio = math.exp(x - float(old[b, t]))
                return ratio * KAPPA[k](x - float(log_ref[b, t])) / 8

            x = float(log_pi[b, t])
            slope = (value(x + step) - value(x - step)) / (2 * step)
            assert float(got[b, t]) == pytest.approx(slope, abs=1e-8)


def expected(problem, **options):
    """The gradient over all responses, each alone (its gain counts in full), by its probability."""
    policy = problem.table()
    agent = unclipped("policy-gradient", problem, policy, kl_in="loss", baseline="none", **options)
    total = torch.zeros_like(policy.table)
    for p, row in enumerate(log_probs(policy, problem.space, len(problem.truth))):
        for y in range(len(responses(problem.space))):
            found = gradient(agent, problem.batch([(p, y)]))
            total += math.exp(row[y]) / len(problem.truth) * found
    return total


@levels
@pytest.mark.parametrize("kind", KINDS[1:3], ids=KIND_IDS[1:3])
def test_on_its_own_draws_the_ratio_makes_k3_and_k1_what_k2_is(kind, level):
    problem = case(kind)
    want = expected(problem, kl_estimator="k2", kl_level=level)
    assert float(want.abs().max()) > 0.05
    for k in ("k3", "k1"):
        got = expected(problem, kl_estimator=k, kl_level=level, kl_weight="ratio")
        close(got, want, 1e-6)
        plain = expected(problem, kl_estimator=k, kl_level=level)
        assert float((plain - want).abs().max()) > 1e-2


@pytest.mark.slow
@levels
@pytest.mark.parametrize("group_std", [False, True])
@pytest.mark.parametrize("mean_tokens", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, None), (3, 3, 0)])
def test_it_ends_where_k2_in_the_loss_does(shape, mean_tokens, group_std, level):
    problem = problem_of(small_ebm(shape, seed=3))
    k3 = Penalty("k3", "loss", level, group_std, mean_tokens, ratio=True)
    k2 = k3._replace(estimator="k2", ratio=False)
    point = penalised(problem, k3)
    close(point.log_law, penalised(problem, k2).log_law, 0.0)
    assert float(tv(point.log_law, penalised(problem, k3._replace(ratio=False)).log_law)) > 1e-3
    whole = level == "sequence" and not group_std and not (mean_tokens and shape[2] is not None)
    assert (float(tv(point.log_law, problem.log_target)) < 1e-9) == whole
    if group_std:
        groups = [penalised_in_groups(problem, x, 3, True).log_law for x in (k3, k2)]
        close(*groups, 0.0)


def test_what_has_no_closed_form_is_not_computed():
    problem = problem_of(small_ebm((3, 3, 0)))
    for penalty in (Penalty("k2", "loss"), Penalty("k1", "loss", mean_tokens=True)):
        point = penalised(problem, penalty._replace(ratio=True))
        assert (point.log_law, point.degenerate, point.how) == (None, None, "not computed")
    k1 = penalised(problem, Penalty("k1", "loss", "sequence", ratio=True))
    close(k1.log_law, problem.log_target, 1e-12)


def test_a_ratio_is_for_a_penalty_with_a_gradient():
    for name in ("policy-gradient", "ppo", "grpo"):
        config = AGENTS[name].config
        with pytest.raises(ValueError, match=r"kl_weight='ratio' is for .* use kl_in='loss'"):
            config(kl_in="reward", kl_weight="ratio")
        assert config().kl_weight == "none"
        config(kl_in="loss", kl_weight="ratio")
