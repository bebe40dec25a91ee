"""The objectives: losses by their definition in Python loops, expected gradients by enumeration."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from agent_cases import (
    KIND_IDS,
    KINDS,
    WIDE,
    case,
    differentiable_log_probs,
    gradient,
    kl_of,
    log_probs,
    unclipped,
)
from toy_policies import close, responses, seeded

import rl_ebm
from rl_ebm import divergences
from rl_ebm.agents import AGENTS
from rl_ebm.agents.best_of_n import best_of_groups
from rl_ebm.agents.matching import SLOPES, matching_loss
from rl_ebm.agents.on_policy_distillation import on_policy_distillation_loss
from rl_ebm.agents.path_consistency import path_consistency_loss
from rl_ebm.agents.ppo import PPOConfig, clipped_loss
from rl_ebm.agents.shared.kl_penalty import PenaltyOptions, kl_terms, standardised
from rl_ebm.agents.trajectory_balance import batch_log_z, trajectory_balance_loss
from rl_ebm.policies import Uniform
from rl_ebm.studies.problems import problems

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
TINY = [((2, 2, None), None, False), ((3, 2, 0), None, True)]
in_tiny_kinds = pytest.mark.parametrize("kind", TINY, ids=["fixed", "eos-reference"])


def paths(rows=9, steps=4, seed=0):
    """V, log pi, r and lengths of random paths, with garbage past the end."""
    g = seeded(seed)
    v, log_pi, r = (torch.randn(rows, steps, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.arange(rows) % steps + 1
    past = torch.arange(steps) >= lengths[:, None]
    garbage = (1e5, 1e6, -1e7)
    v, log_pi, r = (x.masked_fill(past, y) for x, y in zip((v, log_pi, r), garbage, strict=True))
    return v, log_pi, r, lengths


# Path consistency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("longest", [None, 1, 2])
def test_path_consistency_is_the_weighted_sum_over_all_sub_trajectories(lam, longest):
    v, log_pi, r, lengths = paths()
    v.requires_grad_()
    log_pi.requires_grad_()
    got = path_consistency_loss(v, log_pi, r, lengths, lam, longest)
    rows = []
    for b, n in enumerate(lengths.tolist()):
        total, weights = 0.0, 0.0
        for i in range(n):
            for j in range(i + 1, n + 1):
                if longest is not None and j - i > longest:
                    continue
                end = v[b, j] if j < n else 0.0
                c = v[b, i] - end - sum(r[b, t] - log_pi[b, t] for t in range(i, j))
                total, weights = total + lam ** (j - i) * c**2 / 2, weights + lam ** (j - i)
        rows.append(total / weights)
    want = sum(rows) / len(rows)
    close(got.detach(), want.detach(), 1e-10)
    for mine, other in zip(
        torch.autograd.grad(got, [v, log_pi]), torch.autograd.grad(want, [v, log_pi]), strict=True
    ):
        close(mine, other, 1e-10)


@in_all_kinds
@pytest.mark.parametrize("name", ["path-consistency", "subtb", "detailed-balance"])
def test_every_path_is_consistent_at_q_star_alone(name, kind):
    problem = case(kind)
    batch = problem.batch()
    metrics = unclipped(name, problem, problem.star()).update(batch)
    assert float(metrics["losses/loss"]) < 1e-10
    assert float(metrics["losses/root_value"]) == pytest.approx(problem.log_z(), abs=1e-5)
    assert float(unclipped(name, problem).update(batch)["losses/loss"]) > 1e-2


def test_detailed_balance_is_the_one_step_bellman_residual():
    problem = case(KINDS[1])
    policy, batch = problem.table(), problem.batch()
    q = rl_ebm.policies.scoring.q_values(policy, problem.space, batch.tokens).detach()
    v = torch.logsumexp(q, -1)
    log_ref = problem.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids)
    total = 0.0
    for b, n in enumerate(batch.lengths.tolist()):
        terms = []
        for t in range(n):
            r = log_ref[b, t] + (batch.reward[b] / problem.ebm.beta if t == n - 1 else 0.0)
            later = v[b, t + 1] if t < n - 1 else 0.0
            terms.append(float(q[b, t, batch.tokens[b, t]] - r - later) ** 2)
        total += sum(terms) / n / 2 / len(batch)
    got = unclipped("detailed-balance", problem, policy).update(batch)["losses/loss"]
    assert float(got) == pytest.approx(total, rel=1e-5)


# Trajectory balance -------------------------------------------------------------------------------


@in_all_kinds
@pytest.mark.parametrize("name", ["trajectory-balance", "vargrad"])
def test_trajectory_balance_vanishes_at_the_target_with_its_log_z(name, kind):
    problem = case(kind)
    agent = unclipped(name, problem, problem.star())
    log_z = torch.tensor([t.log_z for t in problem.truth])
    with torch.no_grad():
        agent.log_z.copy_(log_z)
    batch = problem.batch()
    metrics = agent.update(batch)
    assert float(metrics["losses/loss"]) < 1e-9
    assert float(metrics["losses/log_z"]) == pytest.approx(float(log_z.mean()), abs=1e-4)
    other = unclipped(name, problem, problem.star())
    with torch.no_grad():
        other.log_z.copy_(log_z + 1)
    loss = float(other.update(batch)["losses/loss"])
    assert loss == pytest.approx(0.5 if name == "trajectory-balance" else 0.0, abs=1e-4)


def test_the_log_z_of_a_batch_minimises_its_loss():
    g = seeded(2)
    log_pi, log_weight = (torch.randn(10, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 0, 2])
    log_z = batch_log_z(log_pi, log_weight, ids, 4)
    for p in (0, 2):
        close(log_z[ids == p], (log_weight - log_pi)[ids == p].mean().expand(5), 1e-12)
    best = float(trajectory_balance_loss(log_z, log_pi, log_weight))
    for shift in (0.1, -0.1):
        assert float(trajectory_balance_loss(log_z + shift, log_pi, log_weight)) > best


@in_tiny_kinds
def test_the_expected_gradient_of_vargrad_on_policy_is_that_of_the_kl(kind):
    problem = case(kind)
    policy, n = problem.table(), len(responses(problem.space))
    agent = unclipped("vargrad", problem, policy)
    (p_y,) = ([math.exp(x) for x in row] for row in log_probs(policy, problem.space))
    total = torch.zeros_like(policy.table)
    for pair in product(range(n), repeat=2):
        found = gradient(agent, problem.batch([(0, y) for y in pair]))
        total += math.prod(p_y[y] for y in pair) * found
    log_pi = differentiable_log_probs(policy.table, problem.space)
    want = torch.autograd.grad(kl_of(log_pi, problem.star_log_probs()), policy.table)[0]
    assert float(want.abs().max()) > 0.05
    close(total, want / 2, 1e-6)  # (n - 1) / n of it, in batches of n = 2


# Distribution matching ----------------------------------------------------------------------------

F = {
    "forward-kl": lambda t: -t.log(),
    "reverse-kl": lambda t: t * t.log(),
    "js": lambda t: t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log(),
    "tv": lambda t: (1 - t).abs() / 2,
    "chi2": lambda t: (t - 1) ** 2,
}


@in_all_kinds
@pytest.mark.parametrize("divergence", SLOPES)
def test_the_expected_gradient_of_matching_is_that_of_its_divergence(divergence, kind):
    problem = case(kind)
    policy, count = problem.table(), len(problem.truth)
    star = problem.star_log_probs()
    log_pi = differentiable_log_probs(policy.table, problem.space)
    log_z = torch.tensor([t.log_z for t in problem.truth], dtype=torch.float64)
    n, total = star.shape[1], torch.zeros_like(policy.table)
    for p in range(count):
        for y in range(n):
            loss = matching_loss(
                log_pi[p, y][None],
                (star[p, y] + log_z[p])[None],
                log_z[p][None],
                torch.zeros(1, dtype=torch.int64),
                1,
                divergence,
            )
            found = torch.autograd.grad(loss, policy.table, retain_graph=True)[0]
            total += log_pi[p, y].exp().detach() / count * found
    terms = star.exp() * F[divergence]((log_pi - star).exp())
    want = torch.autograd.grad(terms.sum(1).mean(), policy.table)[0]
    assert float(want.abs().max()) > 1e-2
    close(total, want, 1e-9)


def test_the_moving_average_of_z_is_that_of_its_batches():
    problem = case(KINDS[3])
    agent = unclipped("dpg", problem, z_decay=0.75)
    ratios = torch.tensor([[1.0, 3.0, 10.0, 2.0], [5.0, 1.0, 8.0, 4.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 2, 0])
    for row in ratios:
        agent._average(row.log(), ids)
    means = [(6 / 3, 10 / 3), (10.0, 8.0)]  # of prompts 0 and 2, batch by batch
    for p, (first, second) in zip((0, 2), means, strict=True):
        want = (0.25 * 0.75 * first + 0.25 * second) / (0.25 * 0.75 + 0.25)
        got = float((agent.log_z[0, p] - agent.log_z[1, p]).exp())
        assert got == pytest.approx(want, rel=1e-5)
    assert float(agent.log_z[1, 1]) == -math.inf  # nothing was seen of prompt 1


# Clipped policy gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", SLOPES)
def test_prompts_whose_rewards_are_far_apart_do_not_spoil_each_other(divergence):
    space = rl_ebm.TokenSpace(2, 2)
    rows = torch.stack([torch.linspace(0, 1, 4), torch.linspace(1, 2, 4)])
    ebm = rl_ebm.EBM(space, rows, 1e-3, Uniform(space), [[0], [1]])
    policy = rl_ebm.policies.Tabular(space, [[0], [1]], scale=1.0, generator=seeded())
    config = AGENTS["dpg"].config(batch_size=64, divergence=divergence)
    agent = AGENTS["dpg"].agent(ebm, policy, config, seeded(1), None)
    for _ in range(3):
        metrics = agent.update(ebm.score(agent.sample()))
        assert all(bool(torch.isfinite(x)) for x in metrics.values())
    assert bool(torch.isfinite(policy.table[torch.isfinite(policy.table)]).all())


@in_all_kinds
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("advantage", ["none", "group-std"])
def test_the_first_step_of_ppo_is_the_policy_gradient(kind, kl_in, advantage):
    problem = case(kind)
    options = {"kl_estimator": "k3", "kl_in": kl_in, "advantage": advantage}
    batch = problem.batch()
    one = gradient(unclipped("policy-gradient", problem, **options), batch)
    other = gradient(unclipped("ppo", problem, epochs=1, **options), batch)
    assert float(one.abs().max()) > 1e-3
    close(other, one, 1e-6)


def test_a_ratio_that_is_far_and_moves_further_has_no_gradient():
    log_pi = torch.tensor([[0.5, -0.5, 0.1, 0.0]] * 2, dtype=torch.float64, requires_grad=True)
    old = torch.zeros(2, 4, dtype=torch.float64)
    advantage = torch.tensor([2.0, -3.0], dtype=torch.float64)
    lengths = torch.tensor([4, 3])
    options = PPOConfig(clip=0.2)
    loss = clipped_loss(log_pi, old, old, advantage, lengths, options)
    want = 0.0
    for a, n in ((2.0, 4), (-3.0, 3)):
        for x in (0.5, -0.5, 0.1, 0.0)[:n]:
            ratio = math.exp(x)
            want -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 2
    assert float(loss.detach()) == pytest.approx(want)
    (slope,) = torch.autograd.grad(loss, log_pi)
    assert slope[0].ne(0).tolist() == [False, True, True, True]
    assert slope[1].ne(0).tolist() == [True, False, True, False]  # its last is past the end


def test_the_penalty_is_of_tokens_or_of_the_whole_response():
    g = seeded(3)
    log_pi, log_ref = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([3, 2, 1, 3, 2])
    kinds = {"k1": lambda u: u, "k2": lambda u: u * u / 2, "k3": lambda u: math.exp(-u) - 1 + u}
    for k, kappa in kinds.items():
        for level in ("token", "sequence"):
            options = PenaltyOptions(kl_estimator=k, kl_level=level)
            got = kl_terms(log_pi, log_ref, lengths, options).sum(1)
            for b, n in enumerate(lengths.tolist()):
                u = [float(log_pi[b, t] - log_ref[b, t]) for t in range(n)]
                want = sum(map(kappa, u)) if level == "token" else kappa(sum(u))
                assert float(got[b]) == pytest.approx(want)


def test_standardised_advantages_are_those_of_each_group():
    returns = torch.randn(9, generator=seeded(4), dtype=torch.float64)
    ids = torch.tensor([0, 2, 2, 0, 0, 2, 2, 2, 1])
    got = standardised(returns, ids, 3)
    for p in (0, 2):
        mine = returns[ids == p]
        close(got[ids == p], (mine - mine.mean()) / (mine.std() + 1e-6), 1e-10)
    assert float(got[-1]) == 0  # alone in its group


# Teachers -----------------------------------------------------------------------------------------


@in_all_kinds
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_distillation_sums_the_divergences_at_the_states_of_each_response(divergence, kind):
    problem = case(kind)
    space, batch = problem.space, problem.batch(pad=1)
    rows = [
        rl_ebm.policies.scoring.log_pi_rows(p, space, batch.tokens, batch.prompt_ids).detach()
        for p in (problem.table(), problem.star())
    ]
    of = {"forward": divergences.kl, "js": divergences.js}.get(
        divergence, lambda teacher, pi: divergences.kl(pi, teacher)
    )
    want = 0.0
    for b, n in enumerate(batch.lengths.tolist()):
        want += sum(float(of(rows[1][b, t], rows[0][b, t])) for t in range(n)) / len(batch)
    got = on_policy_distillation_loss(*rows, batch.lengths, divergence)
    assert float(got) == pytest.approx(want, rel=1e-9)
    agent = unclipped("on-policy-distillation", problem, problem.star(), divergence=divergence)
    metrics = agent.update(batch)
    assert float(metrics["losses/loss"]) < 1e-9
    assert float(metrics["losses/grad_norm"]) < 1e-5


def test_the_best_row_of_each_group_is_imitated():
    reward = torch.tensor([0.0, 3.0, 3.0, -1.0, -2.0, -1.5, 7.0])
    assert best_of_groups(reward, 3).tolist() == [1, 3, 6]
    problem = case(KINDS[1])
    batch = problem.batch()
    policy = problem.table()
    agent = unclipped("best-of-n", problem, policy, n=len(batch))
    (row,) = log_probs(policy, problem.space)
    best = int(batch.reward.argmax())
    assert float(agent.update(batch)["losses/loss"]) == pytest.approx(-row[best], rel=1e-5)


@in_tiny_kinds
def test_at_the_law_of_the_best_of_n_its_expected_gradient_vanishes(kind):
    problem, n = case(kind), 3
    space = problem.space
    entry = AGENTS["best-of-n"]
    config = entry.config(source="reference", n=n, **WIDE)
    (state,) = problems(rl_ebm.solve(problem.ebm))
    law = entry.fixed_point(config, state).log_law
    q = rl_ebm.q_from_r(state.at_ends(law), space)
    policy = rl_ebm.policies.Tabular.from_tables(q, space)
    explorer = Uniform(space) if problem.ebm.reference is None else problem.ebm.reference
    (drawn,) = log_probs(explorer, space)
    for student, small in ((policy, True), (problem.star(), False)):
        agent = entry.agent(problem.ebm, student, config, seeded())
        total = torch.zeros_like(student.table)
        for rows in product(range(len(drawn)), repeat=n):
            weight = math.exp(math.fsum(drawn[y] for y in rows))
            total += weight * gradient(agent, problem.batch([(0, y) for y in rows]))
        assert (float(total.abs().max()) < 1e-6) == small


# What they share ----------------------------------------------------------------------------------


def test_annealing_grows_the_log_weights_from_nothing_to_their_size():
    problem = case(KINDS[1])
    agent, batch = unclipped("soft-q", problem, anneal=0.5), problem.batch()
    full = agent.log_weights(batch, 1.0)
    assert float(full.abs().max()) > 0.1
    close(agent.log_weights(batch, 0.0), torch.zeros_like(full), 0.0)
    close(agent.log_weights(batch, 0.25), full / 2, 1e-6)
    close(agent.log_weights(batch, 0.7), full, 0.0)


def test_the_learned_log_z_is_saved_and_goes_on():
    problem = case(KINDS[3])
    one = unclipped("trajectory-balance", problem)
    for k in range(3):
        one.update(problem.batch(), k / 10)
    other = unclipped("trajectory-balance", problem, one.policy)
    other.load_state_dict(one.state_dict())
    assert one.log_z.detach().ne(0).all()
    close(other.log_z.detach(), one.log_z.detach(), 0.0)
