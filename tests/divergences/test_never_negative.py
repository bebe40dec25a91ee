"""What is nonnegative is never printed or returned negative, and extremes end in a number."""

from __future__ import annotations

import json
import math
import re
from itertools import islice

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm import bounds, divergences
from rl_ebm.exact import summarise
from rl_ebm.fixed_points import Penalty, flow, penalised
from rl_ebm.fixed_points.boundary import boundary_limit
from rl_ebm.fixed_points.flow import follow
from rl_ebm.fixed_points.penalties import deviation
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.soft_bellman import rounded_up
from rl_ebm.studies.problems import problems
from rl_ebm.tokens import TokenSpace
from rl_ebm.verification.parts import plain
from rl_ebm.verification.state_errors import state_errors


def positive(x):
    """Nonnegative and not -0, which prints as negative."""
    x = torch.as_tensor(x, dtype=torch.float64)
    return bool((x >= 0).all()) and not bool(torch.signbit(x).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_of_what_differs_by_rounding(dtype):
    x = 3 * torch.randn(4000, 7, generator=seeded(1), dtype=dtype)
    x[::5, 2:4] = -torch.inf
    p = x.log_softmax(-1)
    q = (x + 3.7).log_softmax(-1)
    raw = (p.exp() * (p - q).nan_to_num(nan=0.0)).sum(-1)
    assert bool((raw < 0).any())  # what rounding alone makes of it
    for found in (
        divergences.kl(p, q),
        divergences.js(p, q),
        divergences.entropy(p),
        bounds.split_kl(p, q),
        bounds.span_kl(bounds.logit_span(x + 3.7, x)),
    ):
        assert positive(found)
    sure = torch.tensor([[0.0, -torch.inf]], dtype=dtype)
    assert positive(divergences.entropy(sure))
    for of_target in (False, True):
        errors = state_errors(x.clone(), x.clone() + 3.7, of_target)
        assert positive(errors.kl)
        assert positive(errors.entropy)
    assert positive(state_errors(sure.clone(), sure.clone(), True).entropy)


def test_only_rounding_is_lifted_and_gradients_are_kept():
    x = torch.tensor([-1e-17, -1e-9, -0.3, 0.0, 2.0, math.inf], dtype=torch.float64)
    assert rounded_up(x, 5).tolist() == [0.0, -1e-9, -0.3, 0.0, 2.0, math.inf]
    y = torch.tensor([-1e-17, 2.0], dtype=torch.float64, requires_grad=True)
    rounded_up(3 * y, 5).sum().backward()
    assert y.grad.tolist() == [3.0, 3.0]
    # Part of a KL can be negative: log p - log q where p < q.
    part = divergences.kl(torch.tensor([-3.0]), torch.tensor([-1.0]))
    assert float(part) == pytest.approx(-2 * math.exp(-3))


@pytest.mark.parametrize("beta", [1e-6, 1.0, 1e300])
@pytest.mark.parametrize("shape", [(3, 3, None), (3, 4, 1)])
def test_no_figure_of_a_report_is_negative(beta, shape):
    space = TokenSpace(*shape)
    scores = torch.randn(space.num_sequences, generator=seeded(3), dtype=torch.float64)
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores, beta, Uniform(space)))
    assert positive(summarise(solution).entropy)
    # The exact policy up to rounding, and up to a constant of each state.
    tables = [t + torch.randn((*t.shape[:-1], 1)) for t in solution.tables()]
    for policy in (solution, Tabular.from_tables(tables, space)):
        report = rl_ebm.verify(policy, solution)
        figures = report.scalars()
        for key, value in figures.items():
            if key not in ("log_z", "expected_reward_target", "expected_reward_policy"):
                assert positive(value), key
        assert not re.search(r"\s-\d", str(report).split("total variation")[1].split("expected")[0])
        assert figures["js"] <= math.log(2)
        assert figures["tv"] <= 1
        assert all(positive(d.mean_kl) for d in report.per_depth)
        assert all(positive(w.kl) for w in report.worst_prefixes)


def test_json_and_text_know_no_negative_zero():
    assert json.dumps(plain([-0.0, 1.0, -2.0, -math.inf])) == '[0.0, 1.0, -2.0, "-Infinity"]'


# Extremes of the audit ---------------------------------------------------------------------------


def problem(scores, beta, space=None, reference=Uniform):
    space = space or TokenSpace(len(scores), 1)
    p_ref = None if reference is None else reference(space)
    scores = torch.tensor(scores, dtype=torch.float64)
    return problems(rl_ebm.solve(rl_ebm.EBM(space, scores, beta, p_ref)))[0]


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_advantages_over_their_deviation_do_not_feel_the_unit_of_rewards(kind, level):
    penalty = Penalty(kind, "loss", level, group_std=True)
    rewards, beta = [0.4, -1.0, 0.7], 0.6
    want = penalised(problem(rewards, beta), penalty)
    assert (want.how == "root") == (kind == "k3")
    for unit in (1e-280, 1e-12, 1e12, 1e280):
        got = penalised(problem([unit * r for r in rewards], beta), penalty)
        torch.testing.assert_close(got.log_law, want.log_law, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("beta", [1e12, 1e300])
@pytest.mark.parametrize("scores", [[0.0, 1.0], [3.0, -2.0], [0.0, 1e-310], [0.0, 5e-324]])
def test_a_beta_beyond_all_rewards_leaves_the_reference(beta, scores):
    """R / sigma is of order 1 whatever R is: next to a penalty of 1e12 it moves nothing."""
    for kind, level in (("k2", "token"), ("k2", "sequence"), ("k3", "token"), ("k3", "sequence")):
        point = penalised(problem(scores, beta), Penalty(kind, "loss", level, group_std=True))
        assert float(divergences.tv(point.log_law, problem(scores, beta).log_ref_responses)) < 1e-9


def test_the_deviation_of_any_size():
    log_p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    g = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    mean = 0.2 - 0.6 + 2.0
    want = math.sqrt(0.2 * (1 - mean) ** 2 + 0.3 * (2 + mean) ** 2 + 0.5 * (4 - mean) ** 2)
    for unit in (1.0, 1e-300, 1e-200, 1e200, 1e300):
        assert deviation(log_p, unit * g) == pytest.approx(unit * want, rel=1e-12)
    assert deviation(log_p, torch.ones(3, dtype=torch.float64)) == 0.0


def test_a_flow_that_leaves_float64_ends(monkeypatch):
    """No step is short enough where d theta / dt is nan anywhere but at the start."""
    case, calls = problem([0.3, -0.4], 0.5), 0

    def broken(problem, theta, penalty):
        nonlocal calls
        calls += 1
        assert calls < 20_000, "without end"
        moved = calls % 3000 != 1
        return torch.full_like(theta, torch.nan if moved else 0.1)

    monkeypatch.setattr(flow, "field", broken)
    penalty = Penalty("k3", "reward", "token")
    assert len(list(islice(follow(case, penalty), 100))) == 1
    calls = 0
    limit = boundary_limit(case, "k3", "token")
    assert limit.how == "not settled"
    assert limit.log_law is None
