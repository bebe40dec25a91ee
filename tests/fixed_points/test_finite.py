"""Limits of finite groups and finitely many proposals, against sums over every tuple of draws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.agents.sampled_teacher import resample
from rl_ebm.agents.shared.kl_penalty import PenaltyOptions, standardised
from rl_ebm.divergences import tv
from rl_ebm.fixed_points import Penalty, groups, penalised
from rl_ebm.fixed_points.finite import group_fixed_point, resampled_law
from rl_ebm.fixed_points.groups import group_advantages, integrated, listed, multisets
from rl_ebm.policies import Tabular
from rl_ebm.soft_bellman import log_policy
from rl_ebm.studies.problems import problems


def random_law(n, seed=0, scale=1.0):
    return torch.log_softmax(scale * torch.randn(n, generator=seeded(seed), dtype=torch.float64), 0)


def small_problem(beta=0.7, seed=0, space=(2, 2)):
    space = rl_ebm.TokenSpace(*space)
    reference = Tabular(space, scale=0.7, generator=seeded(seed), dtype=torch.float64)
    scores = torch.randn(space.num_sequences, generator=seeded(seed + 1), dtype=torch.float64)
    ebm = rl_ebm.EBM(space, scores, beta, reference)
    return ebm, problems(rl_ebm.solve(ebm))[0]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_law_of_resampled_proposals_is_a_sum_over_all_tuples(n):
    log_b, log_w = random_law(4), 3 * random_law(4, 1) + 100
    log_w[2] = -math.inf
    b, w = log_b.exp().tolist(), (log_w - 100).exp().tolist()
    want = [0.0] * 4
    for draws in product(range(4), repeat=n):
        weight, total = math.prod(b[i] for i in draws), math.fsum(w[i] for i in draws)
        for i in draws:
            want[i] += weight * w[i] / total if total else 0.0
    want = torch.tensor(want, dtype=torch.float64)
    close(resampled_law(log_b, log_w, n).exp(), want / want.sum(), 1e-9)


def test_what_is_never_proposed_may_weigh_anything():
    log_b, log_w = random_law(4), 3 * random_law(4, 1)
    log_b[2] = -math.inf
    rest = torch.tensor([0, 1, 3])
    want = torch.zeros(4, dtype=torch.float64)
    want[rest] = resampled_law(log_b[rest], log_w[rest], 3).exp()
    log_w[2] = 2000.0
    close(resampled_law(log_b, log_w, 3).exp(), want, 1e-12)


def test_with_many_proposals_the_law_is_the_ebm_and_its_bias_falls_as_one_over_n():
    log_b, log_w = random_law(6), 2 * random_law(6, 1)
    star = torch.log_softmax(log_b + log_w, 0)
    bias = [float(tv(resampled_law(log_b, log_w, n), star)) for n in (100, 1000, 10_000)]
    assert bias[0] / bias[1] == pytest.approx(10, rel=0.05)
    assert bias[1] / bias[2] == pytest.approx(10, rel=0.01)
    # Proposals that are the EBM already have no bias, whatever n.
    close(resampled_law(star, torch.zeros(6).double(), 3), star, 1e-10)


def test_the_law_is_that_of_the_agents_own_resampling():
    log_b, log_w = random_law(3), -2 * random_law(3)
    g, n, repeats = seeded(5), 3, 20_000
    drawn = torch.multinomial(log_b.exp(), n * repeats, replacement=True, generator=g)
    ids = torch.arange(repeats).repeat_interleave(n)
    parts = [
        drawn[i : i + 600][resample(log_w[drawn[i : i + 600]], ids[:600], 200, g)]
        for i in range(0, n * repeats, 600)
    ]
    seen = torch.bincount(torch.cat(parts), minlength=3) / (n * repeats)
    close(seen.double(), resampled_law(log_b, log_w, n).exp(), 0.015)
    assert float(tv(resampled_law(log_b, log_w, n), torch.log_softmax(log_b + log_w, 0))) > 0.05


def test_every_multiset_is_there_once():
    rows = multisets(3, 4)
    want = {c for c in product(range(5), repeat=3) if sum(c) == 4}
    assert {tuple(row) for row in rows.long().tolist()} == want
    assert len(rows) == len(want)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_expected_advantage_is_a_sum_over_all_groups(size):
    law, g = random_law(4), torch.randn(4, generator=seeded(2), dtype=torch.float64)
    want = torch.zeros(4, dtype=torch.float64)
    for y in range(4):
        for others in product(range(4), repeat=size - 1):
            group = g[[y, *others]]
            ids = torch.zeros(size, dtype=torch.int64)
            weight = math.exp(math.fsum(float(law[i]) for i in others))
            want[y] += weight * standardised(group, ids)[0]
    close(group_advantages(law, g, size), want, 1e-12)


@pytest.mark.parametrize("size", [2, 3, 7, 16])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("sharp", [1.0, 8.0, 60.0])
def test_the_integral_over_groups_is_the_sum_over_them(size, epsilon, sharp):
    """Sharp laws leave groups that are nearly all alike; one value is never drawn."""
    values = 30 * torch.randn(4, generator=seeded(size), dtype=torch.float64).sort().values
    p = random_law(4, seed=3, scale=sharp).exp()
    p[1] = 0.0
    p /= p.sum()
    want = listed(values, p, size, max(epsilon, 1e-290))
    close(integrated(values, p, size, epsilon), want, 1e-11)


def test_the_integral_sees_two_rewards_that_are_close():
    values = torch.tensor([-1.0, 0.0, 1e-4, 2.0], dtype=torch.float64)
    p = torch.tensor([0.01, 0.48, 0.5, 0.01], dtype=torch.float64)
    close(integrated(values, p, 3, 1e-6), listed(values, p, 3, 1e-6), 1e-11)
    values[2] = 1e-8
    with pytest.raises(OverflowError, match="groups of 3 are too many to list, and rewards"):
        integrated(values, p, 3, 1e-6)


def test_groups_that_are_too_many_to_list_are_integrated_over():
    """Of 64 values, 4e9 groups of 8; of the mean advantage under the law itself 0 is left."""
    law, g = random_law(64), torch.randn(64, generator=seeded(2), dtype=torch.float64)
    mean = (law.exp() * g).sum()
    limit = (g - mean) / (law.exp() * (g - mean).square()).sum().sqrt()
    found = [group_advantages(law, g, size, 1e-6) for size in (8, 64, 512)]
    for x in found:
        assert abs(float((law.exp() * x).sum())) < 1e-11
    off = [float((x - limit).abs().max()) for x in found]
    assert off[0] > 4 * off[1] > 16 * off[2] > 0
    drawn = torch.multinomial(law.exp(), 4 * 200_000, True, generator=seeded(1)).view(-1, 4)
    groups_of_4 = g[drawn]
    z = (groups_of_4[:, 0] - groups_of_4.mean(1)) / (groups_of_4.std(1) + 1e-6)
    first = group_advantages(law, g, 4, 1e-6)
    for y in law.topk(3).indices.tolist():
        seen = z[drawn[:, 0] == y]
        assert abs(float(seen.mean() - first[y])) < 5 * float(seen.std()) / len(seen) ** 0.5


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_at_the_fixed_point_of_a_group_size_the_agents_gradient_vanishes(estimator):
    ebm, problem = small_problem(beta=1.5)
    size, space = 3, ebm.space
    law = group_fixed_point(problem, estimator, size)
    options = PenaltyOptions(kl_estimator=estimator, kl_in="loss", advantage="group-std")
    tokens, lengths = space.sequences()
    ids = torch.zeros(size, dtype=torch.int64)
    log_ref = ebm.log_ref(tokens, lengths, torch.zeros_like(lengths)).double()

    def slope(law):
        first = torch.stack([law[:2].logsumexp(0), law[2:].logsumexp(0)])
        tables = [first[None], law.view(2, 2) - first[:, None]]
        policy = Tabular.from_tables(tables, space)
        total = torch.zeros_like(policy.table)
        for group in product(range(4), repeat=size):
            rows = torch.tensor(group)
            log_pi = log_policy(policy.logits(tokens[rows])).gather(2, tokens[rows][..., None])
            loss = policy_gradient_loss(
                log_pi[..., 0],
                log_ref[rows],
                problem.g_responses[rows],
                lengths[rows],
                ids,
                1,
                options,
                ebm.beta,
            )
            weight = math.exp(math.fsum(law[rows].tolist()))
            total += weight * torch.autograd.grad(loss, policy.table)[0]
        return float(total.abs().max())

    assert slope(law) < 1e-9
    limit = penalised(problem, Penalty(estimator, "loss", group_std=True)).log_law
    assert slope(limit) > 1e-3


def test_what_is_never_drawn_adds_no_groups(monkeypatch):
    _, problem = small_problem()
    gone = problem.log_ref[0].clone()
    gone[0, 1] = -math.inf
    problem = replace(problem, log_ref=[log_policy(gone), problem.log_ref[1]])
    kinds = []

    def counted(count, size):
        kinds.append(count)
        return multisets(count, size)

    monkeypatch.setattr(groups, "multisets", counted)
    law = group_fixed_point(problem, "k2", 3)
    assert set(kinds) == {2}  # of four responses with different rewards
    assert law.isneginf().tolist() == [False, False, True, True]


def test_large_groups_end_where_groups_without_end_do():
    _, problem = small_problem(beta=1.0)
    limit = penalised(problem, Penalty("k3", "loss", group_std=True)).log_law
    away = [float(tv(group_fixed_point(problem, "k3", n), limit)) for n in (4, 16, 64)]
    assert away[0] > 2.5 * away[1] > 6 * away[2] > 0


def test_an_iteration_that_does_not_settle_says_so():
    _, problem = small_problem()
    with pytest.raises(RuntimeError, match="groups of 4 was not found"):
        group_fixed_point(problem, "k3", 4, iterations=2)
