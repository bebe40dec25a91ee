"""Teacher forcing: the loss is KL(teacher, pi) plus the teacher's entropy, and so its gradient."""

from __future__ import annotations

import math

import brute_force
import pytest
import torch
from agent_cases import (
    KIND_IDS,
    KINDS,
    case,
    differentiable_log_probs,
    gradient,
    kl_of,
    log_probs,
    train,
)
from toy_policies import close, responses, scores_of, seeded

import rl_ebm
from rl_ebm.agents import TeacherForcingAgent, TeacherForcingConfig
from rl_ebm.agents.shared.imitation import teacher_forcing_loss

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
UNCLIPPED = TeacherForcingConfig(max_grad_norm=1e12)


def test_the_loss_sums_over_real_tokens_and_averages_over_rows():
    q = torch.randn(3, 3, 4, generator=seeded(), dtype=torch.float64)
    q[2, 1:] = -math.inf  # unread: nothing follows the only token of row 2
    tokens, lengths = torch.tensor([[0, 3, 1], [2, 2, 0], [1, 0, 0]]), torch.tensor([3, 2, 1])
    want = 0.0
    for row, y, n in zip(q.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        want -= math.fsum(brute_force.log_softmax(row[t])[y[t]] for t in range(n)) / 3
    q.requires_grad_()
    loss = teacher_forcing_loss(q, tokens, lengths)
    close(float(loss.detach()), want)
    loss.backward()
    assert torch.isfinite(q.grad).all()
    assert (q.grad[2, 1:] == 0).all()


@in_all_kinds
def test_the_expected_gradient_is_that_of_the_kl_and_the_loss_exceeds_it_by_the_entropy(kind):
    problem = case(kind)
    policy, star = problem.table(), problem.star_log_probs()
    agent = TeacherForcingAgent(problem.ebm, policy, UNCLIPPED, teacher=problem.star())
    count, loss, total = len(problem.truth), 0.0, torch.zeros_like(policy.table)
    before = policy.table.detach().clone()
    for p in range(count):
        for k in range(len(responses(problem.space))):
            weight = float(star[p, k].exp()) / count
            total += weight * gradient(agent, problem.batch([(p, k)]))
            loss += weight * float(agent.update(problem.batch([(p, k)]), 1.0)["losses/loss"])
            policy.table.data.copy_(before)
    entropy = math.fsum(t.entropy() for t in problem.truth) / count
    assert loss == pytest.approx(problem.kl(policy) + entropy, abs=1e-10)
    log_pi = differentiable_log_probs(policy.table, problem.space)
    want = torch.autograd.grad(kl_of(star, log_pi), policy.table)[0]
    assert want.abs().max() > 0.05
    close(total, want)


@in_all_kinds
def test_the_expected_gradient_vanishes_at_the_target(kind):
    problem = case(kind)
    policy, star = problem.star(), problem.star_log_probs()
    agent = TeacherForcingAgent(problem.ebm, policy, UNCLIPPED, teacher=problem.star())
    total = sum(
        float(star[p, k].exp()) * gradient(agent, problem.batch([(p, k)]))
        for p in range(len(problem.truth))
        for k in range(len(responses(problem.space)))
    )
    close(total, torch.zeros_like(policy.table))


def test_any_policy_is_a_teacher_and_answers_each_prompt_itself():
    problem = case(KINDS[2])
    teacher = problem.table(seed=3)
    config = TeacherForcingConfig(batch_size=6000)
    agent = TeacherForcingAgent(problem.ebm, problem.table(), config, seeded(1), teacher)
    batch = agent.sample()
    assert torch.bincount(batch.prompt_ids).tolist() == [2000] * 3
    places = (batch.tokens * torch.tensor([4, 2, 1])).sum(1)
    for p, row in enumerate(log_probs(teacher, problem.space, 3)):
        counts = torch.bincount(places[batch.prompt_ids == p], minlength=8)
        for count, log_p in zip(counts.tolist(), row, strict=True):
            share = math.exp(log_p)
            # Five standard deviations of a binomial count.
            assert abs(count - 2000 * share) <= 5 * math.sqrt(2000 * share * (1 - share))


def test_it_needs_a_teacher_and_a_batch():
    problem = case(KINDS[0])
    with pytest.raises(ValueError, match=r"needs a teacher: pass teacher=rl_ebm\.solve\(ebm\)"):
        TeacherForcingAgent(problem.ebm, problem.table())
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        TeacherForcingConfig(batch_size=0)


def test_rewards_are_not_read_and_impossible_responses_are_learned():
    scores = scores_of(rl_ebm.TokenSpace(3, 3))
    scores[:9] = -math.inf  # the whole first subtree
    problem = case(KINDS[0], scores=scores)
    policy = problem.table(dtype=torch.float32)
    config = TeacherForcingConfig(batch_size=512, lr=0.1)
    agent = TeacherForcingAgent(problem.ebm, policy, config, seeded(2), rl_ebm.solve(problem.ebm))
    for step in range(200):
        metrics = agent.update(agent.sample(), step / 200)
    assert torch.isfinite(metrics["losses/loss"])
    assert problem.kl(policy) < 0.01
    assert torch.isfinite(policy.table).all()


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        pytest.param(KINDS[1], False, marks=pytest.mark.slow),
        (KINDS[2], False),
        pytest.param(KINDS[3], True, marks=pytest.mark.slow),
    ],
    ids=["eos-reference", "fixed-prompts-reference", "transformer"],
)
def test_it_reaches_the_ebm_from_a_random_start(kind, network):
    problem = case(kind)
    policy = problem.network() if network else problem.table(dtype=torch.float32)
    assert problem.kl(policy) > 0.1
    config = TeacherForcingConfig(batch_size=1024, lr=1e-2 if network else 0.2)
    teacher = rl_ebm.solve(problem.ebm)
    train(
        TeacherForcingAgent(problem.ebm, policy, config, seeded(2), teacher),
        problem.ebm,
        250,
    )
    # Sampling noise, not the objective, sets this.
    assert problem.kl(policy) < 3e-3
