"""Policy gradient: RLOO by its definition; its expectation, over all groups, is that of a KL."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from agent_cases import KINDS, case, differentiable_log_probs, gradient, kl_of, log_probs, train
from toy_policies import close, responses, scores_of, seeded

import rl_ebm
from rl_ebm.agents import PolicyGradientAgent, PolicyGradientConfig
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.agents.shared.kl_penalty import centred
from rl_ebm.tokens import Batch

# Small enough for every group of k responses: 4, 3, 3 and 2 responses.
TINY = [
    ((2, 2, None), None, False),
    ((3, 2, 0), None, True),
    ((2, 3, 1), None, True),
    ((2, 2, 1), [[], [3]], True),
]
TINY_IDS = ["fixed", "eos-reference", "eos-late-reference", "prompts-reference"]
in_tiny_kinds = pytest.mark.parametrize("kind", TINY, ids=TINY_IDS)


def unclipped(n=8, **options):
    return PolicyGradientConfig(batch_size=n, group_size=2, max_grad_norm=1e12, **options)


# The baseline -----------------------------------------------------------------------------------


def test_a_baseline_is_the_mean_of_the_others_with_the_same_prompt_or_of_all_or_none():
    returns = torch.randn(11, generator=seeded(), dtype=torch.float64)
    ids = torch.tensor([0, 2, 2, 0, 4, 2, 0, 0, 1, 4, 2])  # one response to 1, none to 3
    want = []
    for i, p in enumerate(ids.tolist()):
        others = [float(g) for j, g in enumerate(returns) if j != i and ids[j] == p]
        want.append(float(returns[i]) - (math.fsum(others) / len(others) if others else 0.0))
    close(centred(returns, ids, 5), torch.tensor(want, dtype=torch.float64))
    alone = centred(returns[:1], ids[:1])
    close(alone, returns[:1], 0.0)
    close(centred(returns, ids, 5, "none"), returns, 0.0)
    want = [float(g - returns[ids == p].mean()) for g, p in zip(returns, ids, strict=True)]
    close(centred(returns, ids, 5, "group-mean"), torch.tensor(want, dtype=torch.float64))


def test_the_loss_is_minus_the_mean_of_advantage_times_log_pi_and_its_gradient_the_advantage():
    g = seeded(1)
    log_pi, log_ref = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    gain = torch.randn(6, generator=g, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 2, 3, 2, 1])
    past = torch.arange(3) >= lengths[:, None]
    log_pi, log_ref = log_pi.masked_fill(past, 0.0), log_ref.masked_fill(past, 0.0)
    log_pi.requires_grad_()
    ids = torch.tensor([0, 1, 0, 1, 1, 0])
    returns = gain + (log_ref - log_pi.detach()).sum(1)
    advantage = centred(returns, ids, 2)
    loss = policy_gradient_loss(log_pi, log_ref, gain, lengths, ids, 2)
    close(float(loss.detach()), -math.fsum((advantage * log_pi.detach().sum(1)).tolist()) / 6)
    loss.backward()
    # Had the returns a gradient, it would be in here.
    close(log_pi.grad, (-advantage[:, None] / 6).expand(6, 3).masked_fill(past, 0.0))


# The gradient -----------------------------------------------------------------------------------


def expected_gradient(problem, policy, k):
    """Every k-tuple of responses to every prompt, with its probability: k = 2 or more."""
    agent = PolicyGradientAgent(problem.ebm, policy, unclipped())
    count, n = len(problem.truth), len(responses(problem.space))
    p_y = [[math.exp(x) for x in row] for row in log_probs(policy, problem.space, count)]
    total = torch.zeros_like(policy.table)
    for groups in product(product(range(n), repeat=k), repeat=count):
        rows = [(p, y) for p, group in enumerate(groups) for y in group]
        total += math.prod(p_y[p][y] for p, y in rows) * gradient(agent, problem.batch(rows))
    return total


def kl_gradient(problem, policy):
    """Autograd of the mean over prompts of KL(pi, p*) over whole responses."""
    log_pi = differentiable_log_probs(policy.table, problem.space)
    return torch.autograd.grad(kl_of(log_pi, problem.star_log_probs()), policy.table)[0]


@in_tiny_kinds
@pytest.mark.parametrize("k", [2, 3])
def test_the_expected_gradient_over_all_groups_is_that_of_the_kl(kind, k):
    problem = case(kind)
    policy = problem.table()
    want = kl_gradient(problem, policy)
    assert want.abs().max() > 0.05
    close(expected_gradient(problem, policy, k), want, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_baseline_the_expected_gradient_is_the_same(kind):
    problem = case(kind)
    policy, n = problem.table(), len(responses(problem.space))
    agent = PolicyGradientAgent(problem.ebm, policy, unclipped())
    total = torch.zeros_like(policy.table)
    for p, row in enumerate(log_probs(policy, problem.space, len(problem.truth))):
        for y in range(n):
            alone = gradient(agent, problem.batch([(p, y)]))
            total += math.exp(row[y]) / len(problem.truth) * alone
    close(total, kl_gradient(problem, policy), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_target_every_group_has_no_advantage_and_the_elbo_is_log_z(kind):
    problem = case(kind)
    agent = PolicyGradientAgent(problem.ebm, problem.star(), unclipped())
    metrics = agent.update(problem.batch(), 0.5)
    assert float(metrics["losses/grad_norm"]) < 1e-6
    assert float(metrics["losses/loss"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["losses/elbo"]) == pytest.approx(problem.log_z(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_return_is_log_z_minus_the_kl(kind):
    problem = case(kind)
    policy, elbo = problem.table(), 0.0
    agent = PolicyGradientAgent(problem.ebm, policy, unclipped())
    before = policy.table.detach().clone()
    for p, row in enumerate(log_probs(policy, problem.space, len(problem.truth))):
        for y, log_p in enumerate(row):
            metrics = agent.update(problem.batch([(p, y)]), 1.0)
            elbo += math.exp(log_p) / len(problem.truth) * float(metrics["losses/elbo"])
            policy.table.data.copy_(before)
    assert elbo == pytest.approx(problem.log_z() - problem.reverse_kl(policy), abs=1e-6)


def test_beta_and_the_reference_change_the_gradient_as_they_change_the_target():
    for beta in (0.3, 2.0):
        for with_reference in (False, True):
            problem = case(((3, 2, 1), None, with_reference), beta=beta)
            policy = problem.table()
            close(expected_gradient(problem, policy, 2), kl_gradient(problem, policy), 2e-6)


# Impossible responses -----------------------------------------------------------------------------


def test_impossible_responses_need_a_stand_in_and_are_pushed_to_it():
    kind = TINY[0]
    scores = scores_of(rl_ebm.TokenSpace(*kind[0]))
    scores[2] = -math.inf
    problem = case(kind, scores=scores, floor=-6.0)
    with pytest.raises(ValueError, match=r"log-weight -inf.*give forbidden_log_weight"):
        PolicyGradientAgent(problem.ebm, problem.table())
    agent = PolicyGradientAgent(problem.ebm, problem.star(), unclipped(forbidden_log_weight=-6))
    metrics = agent.update(problem.batch(), 0.5)
    assert float(metrics["losses/grad_norm"]) < 1e-6
    assert float(metrics["losses/elbo"]) == pytest.approx(problem.log_z(), abs=1e-6)


# Sampling and learning ----------------------------------------------------------------------------


def test_it_samples_its_own_policy_in_groups_that_share_a_prompt():
    problem = case(((3, 3, None), [[4, i] for i in range(7)], False))
    policy = problem.table()
    for p in range(7):  # prompt p is answered by its number in base 3, almost surely
        digits = (p // 9, p // 3 % 3, p % 3)
        policy.table.data[p] = -50.0
        for s, row in zip(range(13), policy.table.data[p], strict=True):
            row[digits[0 if s == 0 else 1 if s < 4 else 2]] = 50.0
    # The rows of 15 that make no second group of 8 are not drawn.
    for n, k, groups in ((12, 4, 3), (14, 2, 7), (15, 8, 1), (40, 2, 7)):
        config = PolicyGradientConfig(batch_size=n, group_size=k)
        batch = PolicyGradientAgent(problem.ebm, policy, config, seeded(1)).sample()
        assert len(batch) == n // k * k
        counts = torch.bincount(batch.prompt_ids, minlength=7)
        assert (counts > 0).sum() == groups
        assert (counts % k == 0).all()
        place = torch.tensor([9, 3, 1])
        assert torch.equal((batch.tokens * place).sum(1), batch.prompt_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 1},
            r"group_size must be in \[2, 2048\], what a batch grows to by itself, got 1",
        ),
        ({"group_size": 9, "batch_size": 8}, r"group_size must be in \[2, batch_size=8\], got 9"),
        ({"baseline": "none", "advantage": "group-std"}, "use advantage='none'"),
        ({"baseline": "mean"}, "baseline must be one of leave-one-out, group-mean, none"),
        ({"batch_size": 0}, "group_size must be in"),
    ],
)
def test_a_group_has_others_to_compare_with(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradientConfig(**options)


def test_it_asks_for_rewards():
    problem = case(TINY[0])
    batch = problem.batch()
    agent = PolicyGradientAgent(problem.ebm, problem.table())
    with pytest.raises(ValueError, match=r"no rewards: call ebm\.score"):
        agent.update(Batch(batch.tokens, batch.lengths, batch.prompt_ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "network"),
    [(KINDS[1], False), (KINDS[2], False), pytest.param(KINDS[3], True, marks=pytest.mark.slow)],
    ids=["eos-reference", "fixed-prompts-reference", "transformer"],
)
def test_it_reaches_the_ebm_from_a_random_start(kind, network):
    problem = case(kind)
    policy = problem.network() if network else problem.table(dtype=torch.float32)
    assert problem.kl(policy) > 0.1
    config = PolicyGradientConfig(batch_size=512, lr=1e-2 if network else 0.2)
    train(
        PolicyGradientAgent(problem.ebm, policy, config, seeded(2)),
        problem.ebm,
        250,
    )
    assert problem.kl(policy) < 3e-3
    assert problem.reverse_kl(policy) < 2e-3
