"""The exact agent: its loss and gradient are those of the KL over whole responses, both ways."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import (
    KIND_IDS,
    KINDS,
    case,
    differentiable_log_probs,
    kl_of,
    states,
    train,
)
from toy_policies import close, scores_of, seeded, tabular

import rl_ebm
from rl_ebm.agents import ExactAgent, ExactConfig
from rl_ebm.agents.exact import exact_loss
from rl_ebm.policies import Tabular, tree_q_values
from rl_ebm.soft_bellman import log_policy

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
in_both_directions = pytest.mark.parametrize("direction", ["forward", "reverse"])


def sequence_kl(problem, table, direction):
    """The KL over whole responses, with gradient."""
    log_pi, star = differentiable_log_probs(table, problem.space), problem.star_log_probs()
    return kl_of(star, log_pi) if direction == "forward" else kl_of(log_pi, star)


@in_all_kinds
@in_both_directions
def test_the_loss_is_the_kl_over_responses_and_its_gradient_that_of_the_kl(kind, direction):
    problem = case(kind)
    policy, count = problem.table(), len(problem.truth)
    q = tree_q_values(policy, problem.space, count)
    star = log_policy(tree_q_values(problem.star(), problem.space, count)).detach()
    loss = exact_loss(q, star, problem.space, direction)
    kl = problem.kl(policy) if direction == "forward" else problem.reverse_kl(policy)
    assert float(loss.detach()) == pytest.approx(kl, abs=1e-10)
    got = torch.autograd.grad(loss, policy.table)[0]
    want = torch.autograd.grad(sequence_kl(problem, policy.table, direction), policy.table)[0]
    assert want.abs().max() > 0.05
    close(got, want)


def test_the_gradient_of_the_reverse_kl_goes_through_the_probabilities_of_states_too():
    problem = case(KINDS[0])
    policy = problem.table()
    q = tree_q_values(policy, problem.space)
    star = log_policy(tree_q_values(problem.star(), problem.space)).detach()
    loss = exact_loss(q, star, problem.space, "reverse")
    whole = torch.autograd.grad(loss, policy.table, retain_graph=True)[0]
    # With pi(s) held constant: sum_s pi(s) grad KL(pi(.|s), pi*(.|s)), root first.
    log_pi, place = log_policy(q), {s: i for i, s in enumerate(states(problem.space))}
    held = 0.0
    for s, i in place.items():
        log_s = sum(log_pi[0, place[s[:t]], a].detach() for t, a in enumerate(s))
        row = (log_pi[0, i].exp() * (log_pi[0, i] - star[0, i])).sum()
        held = held + math.exp(float(log_s)) * row
    partial = torch.autograd.grad(held, policy.table)[0]
    assert (whole - partial)[0, 0].abs().max() > 0.01
    close(whole[0, 4:], partial[0, 4:])


@in_all_kinds
@in_both_directions
def test_an_update_descends_that_loss(kind, direction):
    problem = case(kind)
    policy = problem.table()
    config = ExactConfig(direction, max_grad_norm=1e12)
    agent = ExactAgent(problem.ebm, policy, config, teacher=rl_ebm.solve(problem.ebm))
    loss = sequence_kl(problem, policy.table, direction)
    want = torch.autograd.grad(loss, policy.table)[0]
    metrics = agent.update(None, 0.5)
    assert float(metrics["losses/loss"]) == pytest.approx(value_of(loss), abs=1e-6)
    close(policy.table.grad, want, 1e-6)
    assert float(metrics["losses/grad_norm"]) == pytest.approx(float(want.norm()), abs=1e-6)


@in_all_kinds
@in_both_directions
def test_loss_and_gradient_vanish_at_the_target(kind, direction):
    problem = case(kind)
    config = ExactConfig(direction)
    agent = ExactAgent(problem.ebm, problem.star(), config, teacher=rl_ebm.solve(problem.ebm))
    metrics = agent.update()
    assert float(metrics["losses/loss"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["losses/grad_norm"]) < 1e-6


def test_it_draws_nothing():
    problem = case(KINDS[0])
    agent = ExactAgent(problem.ebm, problem.table(), teacher=rl_ebm.solve(problem.ebm))
    assert agent.sample() is None


# Impossible responses -----------------------------------------------------------------------------


def some_impossible(kind):
    scores = scores_of(rl_ebm.TokenSpace(*kind[0]))
    scores[:9] = -math.inf  # fixed length: a whole subtree; EOS mode: all but the longest few
    return case(kind, scores=scores)


@pytest.mark.parametrize("kind", [KINDS[0], ((4, 3, 1), None, True)], ids=["fixed", "eos"])
def test_forward_learns_around_impossible_responses_without_nan(kind):
    problem = some_impossible(kind)
    policy = problem.table()
    config = ExactConfig("forward", max_grad_norm=1e12)
    agent = ExactAgent(problem.ebm, policy, config, teacher=rl_ebm.solve(problem.ebm))
    loss = sequence_kl(problem, policy.table, "forward")
    want = torch.autograd.grad(loss, policy.table)[0]
    metrics = agent.update(None, 0.5)
    assert float(metrics["losses/loss"]) == pytest.approx(value_of(loss), abs=1e-6)
    close(policy.table.grad, want, 1e-6)


def value_of(loss):
    value = float(loss.detach())
    assert math.isfinite(value)
    return value


def test_reverse_refuses_impossible_responses_and_says_what_to_do():
    problem = some_impossible(KINDS[0])
    teacher = rl_ebm.solve(problem.ebm)
    with pytest.raises(ValueError, match=r"KL\(policy, target\) is infinite: use direction='for"):
        ExactAgent(problem.ebm, problem.table(), ExactConfig("reverse"), teacher=teacher)


def test_reverse_takes_what_eos_mode_forbids_by_itself():
    problem = case(KINDS[1])
    ExactAgent(problem.ebm, problem.table(), ExactConfig("reverse"), teacher=problem.star())


# Errors, other teachers, learning -----------------------------------------------------------------


def test_options_and_a_missing_teacher_are_refused():
    problem = case(KINDS[0])
    with pytest.raises(ValueError, match=r"needs a teacher: pass teacher=rl_ebm\.solve\(ebm\)"):
        ExactAgent(problem.ebm, problem.table())
    with pytest.raises(ValueError, match="direction must be 'forward' or 'reverse', got 'back'"):
        ExactConfig("back")


@in_both_directions
def test_a_trainable_policy_may_teach_and_is_left_alone(direction):
    space = rl_ebm.TokenSpace(3, 3)
    ebm = rl_ebm.EBM(space, scores_of(space))
    teacher, policy = tabular(space, seed=1), Tabular(space, generator=seeded(2))
    before = teacher.table.detach().clone()
    agent = ExactAgent(ebm, policy, ExactConfig(direction, lr=0.1), teacher=teacher)
    for step in range(150):
        metrics = agent.update(None, step / 150)
    assert float(metrics["losses/loss"]) < 1e-3
    assert teacher.table.grad is None
    close(teacher.table.detach(), before, 0.0)


@pytest.mark.parametrize(
    ("kind", "network"),
    [(KINDS[1], False), (KINDS[2], False), pytest.param(KINDS[3], True, marks=pytest.mark.slow)],
    ids=["eos-reference", "fixed-prompts-reference", "transformer"],
)
@in_both_directions
def test_it_reaches_the_ebm_from_a_random_start(kind, network, direction):
    problem = case(kind)
    policy = problem.network() if network else problem.table(dtype=torch.float32)
    assert problem.kl(policy) > 0.1
    config = ExactConfig(direction, lr=1e-2 if network else 0.1)
    agent = ExactAgent(problem.ebm, policy, config, teacher=rl_ebm.solve(problem.ebm))
    train(agent, problem.ebm, 250)
    assert problem.kl(policy) < 3e-3
    assert problem.reverse_kl(policy) < 2e-3
