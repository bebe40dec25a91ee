"""Limits of policy gradients where something is driven out, and what has no limit to name."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from fixed_point_cases import PENALTIES, problem_of, small_ebm
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.divergences import tv
from rl_ebm.fixed_points import Penalty, boundary, penalised
from rl_ebm.fixed_points.boundary import boundary_limit, settled, staying
from rl_ebm.fixed_points.flow import by_depth, follow
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.soft_bellman import sequence_log_probs
from rl_ebm.studies.problems import problems


@pytest.mark.parametrize("shape", [(3, 2, None), pytest.param((2, 3, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("k", ["k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_penalty_in_the_reward_drives_responses_out(shape, k, level):
    ebm = small_ebm(shape, beta=1.5, seed=6)
    problem = problem_of(ebm)
    point = boundary_limit(problem, k, level)
    assert point.degenerate
    assert point.how == "flow"
    law = point.log_law.exp()
    left = law > 0
    assert 1 <= int(left.sum()) < len(law)
    close(float(law.sum()), 1.0, 1e-12)
    if level == "sequence" and left.sum() > 1:
        u = (point.log_law - problem.log_ref_responses)[left]
        kappa = u.square() / 2 if k == "k2" else (-u).exp() - 1 + u
        equal = problem.g_responses[left] - kappa
        close(equal, equal[:1].expand_as(equal), 1e-9)
        assert bool((u > 0).all())
    for _, theta, _ in islice(follow(problem, Penalty(k, "reward", level), tolerance=1e-4), 300):
        flow = sequence_log_probs(by_depth(problem, theta), problem.space)
    assert float(tv(flow, point.log_law)) < 0.01


def test_a_common_action_of_a_skewed_reference_can_come_to_rest_inside():
    ref, reward = [0.1, 0.9], [1.0, 0.0]
    space = rl_ebm.TokenSpace(2, 1)
    reference = Tabular.from_tables([torch.tensor([ref], dtype=torch.float64).log()], space)
    problem = problem_of(rl_ebm.EBM(space, torch.tensor(reward).double(), 1.0, reference))
    point = penalised(problem, Penalty("k2", "reward"))
    assert point.degenerate is False
    assert point.how == "flow"
    theta = [math.log(p) for p in ref]  # Euler's steps of the gradient's flow, one state
    for _ in range(4000):
        top = max(theta)
        weights = [math.exp(x - top) for x in theta]
        pi = [w / sum(weights) for w in weights]
        gain = [r - math.log(p / q) ** 2 / 2 for r, p, q in zip(reward, pi, ref, strict=True)]
        mean = sum(p * x for p, x in zip(pi, gain, strict=True))
        theta = [t + 0.2 * p * (x - mean) for t, p, x in zip(theta, pi, gain, strict=True)]
    close(point.log_law.exp(), torch.tensor(pi, dtype=torch.float64), 1e-8)
    assert pi[1] < ref[1]  # rarer than under p_ref, and yet it stays


@pytest.mark.parametrize("k", ["k2", "k3"])
def test_where_the_limit_never_is_nothing_needs_to_balance(k):
    space = rl_ebm.TokenSpace(3, 2)
    scores = torch.tensor([5.0, 0.0, 0.0, 0.0, 20.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    problem = problem_of(rl_ebm.EBM(space, scores, 1.0, Uniform(space)))
    # After token 1 two actions seem to stay, and no law has their returns less penalty equal.
    rows = ([[0.998, 0.001, 0.001]], [[0.99, 0.005, 0.005], [0.45, 0.45, 0.1], [0.8, 0.1, 0.1]])
    log_pi = [torch.tensor(x, dtype=torch.float64).log() for x in rows]
    limit = settled(problem, log_pi, k, "token")
    close(limit.exp(), torch.eye(9, dtype=torch.float64)[0], 1e-12)


def test_a_flow_is_given_up_after_a_number_of_steps_and_not_of_seconds(monkeypatch):
    monkeypatch.setattr(boundary, "STEPS", 20)
    short = boundary_limit(problem_of(small_ebm((3, 2, None), beta=1.5, seed=6)), "k2", "sequence")
    assert short.log_law is None
    assert short.how == "not settled"
    monkeypatch.setattr(boundary, "STEPS", 400)
    found = [
        boundary_limit(problem_of(small_ebm((3, 2, None), beta=1.5, seed=6)), "k2", "sequence")
        for _ in range(2)
    ]
    assert all(point.degenerate and point.how == "flow" for point in found)
    assert torch.equal(found[0].log_law, found[1].log_law)


def test_where_several_responses_are_best_no_law_is_named():
    space = rl_ebm.TokenSpace(2, 2)
    tied = rl_ebm.EBM(space, torch.tensor([1.0, 0.0, 1.0, 0.5]), 1.0, Uniform(space))
    for point in (
        penalised(problem_of(tied), Penalty("k1", "loss")),
        AGENTS["best-of-n"].fixed_point(AGENTS["best-of-n"].config(), problem_of(tied)),
    ):
        assert point.log_law is None
        assert point.degenerate
        assert point.how == "several best responses"


def test_one_response_of_a_group_is_imitated_as_it_comes():
    problem = problem_of(small_ebm((3, 2, None)))
    for source in ("policy", "reference"):
        config = AGENTS["best-of-n"].config(n=1, source=source)
        point = AGENTS["best-of-n"].fixed_point(config, problem)
        assert not point.degenerate
        close(point.log_law, problem.log_ref_responses, 1e-12)


def test_without_a_reference_responses_start_uniform_token_by_token():
    # EOS mode: the counting measure of responses is another law than that of equal tokens.
    space = rl_ebm.TokenSpace(3, 3, 0)
    ebm = rl_ebm.EBM(space, lambda tokens, lengths: lengths.double(), 1.0)
    problem = problem_of(ebm)
    config = AGENTS["best-of-n"].config(n=2, source="reference")
    law = AGENTS["best-of-n"].fixed_point(config, problem).log_law.exp()
    _, lengths = space.sequences()
    by_length = [float(law[lengths == n].sum()) for n in (1, 2, 3)]
    one = [1 / 3, 2 / 9, 4 / 9]  # who draws: EOS with 1/3 at each state, forced at the last
    below = [sum(one[:i]) for i in range(4)]
    close(by_length, [below[i + 1] ** 2 - below[i] ** 2 for i in range(3)], 1e-12)


@pytest.mark.parametrize(
    ("k", "place", "baseline", "depends"),
    [
        ("k1", "reward", True, False),
        ("k1", "reward", False, True),
        ("k2", "loss", True, True),
        ("k3", "loss", True, True),
    ],
)
def test_whether_a_fixed_point_depends_on_who_draws(k, place, baseline, depends):
    """At the law, the expected gradient over another policy's responses vanishes or does not."""
    problem = problem_of(small_ebm((3, 2, None), seed=2))
    point = penalised(problem, Penalty(k, place, "sequence", baseline=baseline))
    drawn = torch.log_softmax(torch.randn(9, generator=seeded(5), dtype=torch.float64), 0).exp()
    u, gain = point.log_law - problem.log_ref_responses, problem.g_responses
    if place == "reward":
        gain = gain - u
    if baseline:
        gain = gain - (drawn * gain).sum()
    if place == "loss":
        gain = gain - (u if k == "k2" else -torch.expm1(-u))
    # One logit for each response.
    slope = drawn * gain - point.log_law.exp() * (drawn * gain).sum()
    assert (float(slope.abs().max()) > 1e-3) == depends
    assert float(slope.abs().max()) > 1e-3 or float(slope.abs().max()) < 1e-10
    assert point.sampler == depends


@pytest.mark.parametrize("k", ["k2", "k3"])
def test_who_stays_has_equal_returns_less_penalty(k):
    log_ref = torch.log_softmax(torch.randn(30, 4, generator=seeded(8), dtype=torch.float64), 1)
    w = torch.randn(30, 4, generator=seeded(9), dtype=torch.float64) * 0.2
    stays = torch.ones(30, 4, dtype=torch.bool)
    stays[:, 0] = stays[::2, 1] = stays[::4, 2] = False
    log_pi, c = staying(log_ref, w, stays, k)
    close(log_pi.exp().sum(1), torch.ones(30).double(), 1e-12)
    assert torch.equal(torch.isneginf(log_pi), ~stays)
    u = (log_pi - log_ref).masked_fill(~stays, 0.0)
    kappa = u.square() / 2 if k == "k2" else (-u).exp() - 1 + u
    solved = ~c.isnan()
    assert 10 < int(solved.sum()) < 30
    rest = (w - kappa - c[:, None]).masked_fill(~stays, 0.0)[solved]
    close(rest, torch.zeros_like(rest), 1e-8)
    assert bool((u[solved] >= 0).all())
    # Where there is none, equal ratios u >= 0 would weigh too much already.
    lowest = w.masked_fill(~stays, math.inf).amin(1, keepdim=True)
    x = (w - lowest).clamp(min=0)
    if k == "k2":
        mass = (log_ref + (2 * x).sqrt()).masked_fill(~stays, -math.inf).logsumexp(1)
        assert bool((mass[~solved] > 0).all())


def test_a_constant_reward_leaves_the_reference():
    space = rl_ebm.TokenSpace(3, 2)
    ebm = rl_ebm.EBM(space, torch.full((9,), 0.4), 0.5, Uniform(space))
    problem = problem_of(ebm)
    for k, place, level in PENALTIES:
        for group_std in (False, True):
            point = penalised(problem, Penalty(k, place, level, group_std))
            if (k, place) != ("k1", "loss"):
                assert not point.degenerate
            close(point.log_law, problem.log_target, 1e-12)


def test_without_a_penalty_the_best_response_takes_all():
    ebm = small_ebm((3, 2, None))
    problem = problem_of(ebm)
    point = penalised(problem, Penalty("k1", "loss"))
    assert point.degenerate
    want = torch.full((9,), -math.inf, dtype=torch.float64)
    want[problem.g_responses.argmax()] = 0.0
    close(point.log_law.exp(), want.exp(), 0.0)
    for _, theta, _ in islice(follow(problem, Penalty("k1", "loss"), tolerance=1e-4), 500):
        law = sequence_log_probs(by_depth(problem, theta), problem.space)
    assert float(tv(law, point.log_law)) < 0.02


@pytest.mark.slow
def test_what_the_reference_forbids_stays_forbidden():
    ebm = small_ebm((3, 2, None), forbid=True)
    problem = problem_of(ebm)
    gone = torch.isneginf(problem.log_ref_responses)
    assert int(gone.sum()) == 3
    for k, place, level in PENALTIES:
        for group_std in (False, True):
            law = penalised(problem, Penalty(k, place, level, group_std)).log_law
            assert bool(torch.isneginf(law[gone]).all()), (k, place, level)
            assert not bool(law.isnan().any())
            close(float(law.exp().sum()), 1.0, 1e-12)


def test_the_best_response_is_one_that_the_reference_allows():
    problem = problem_of(small_ebm((3, 2, None), forbid=True))
    gone = torch.isneginf(problem.log_ref_responses)
    g = torch.linspace(0, 1, 9, dtype=torch.float64) + 5.0 * gone
    point = penalised(problem.with_returns(g), Penalty("k1", "loss"))
    best = max((i for i in range(9) if not gone[i]), key=lambda i: float(g[i]))
    close(point.log_law.exp(), torch.eye(9, dtype=torch.float64)[best], 0.0)


def test_rewards_of_minus_infinity_are_refused():
    space = rl_ebm.TokenSpace(2, 2)
    ebm = rl_ebm.EBM(space, torch.tensor([0.0, 1.0, -math.inf, 0.0]), 1.0, Uniform(space))
    with pytest.raises(ValueError, match="finite"):
        problems(rl_ebm.solve(ebm))
