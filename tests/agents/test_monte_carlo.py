"""Monte-Carlo regression: its minimum is q*, and what it draws later changes no more than that."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, gradient, log_probs, unclipped
from toy_policies import close

import rl_ebm
from rl_ebm.agents.monte_carlo import monte_carlo_loss
from rl_ebm.agents.shared.learner import log_mean_exp
from rl_ebm.policies import Uniform
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)


@in_all_kinds
def test_monte_carlo_has_its_minimum_at_q_star_over_the_references_rollouts(kind):
    problem = case(kind)
    space, count = problem.space, len(problem.truth)
    explorer = Uniform(space) if problem.ebm.reference is None else problem.ebm.reference
    drawn = log_probs(explorer, space, count)
    sizes = []
    for policy in (problem.star(), problem.table()):
        agent = unclipped("monte-carlo", problem, policy)
        for _ in range(2):  # after the first pass the constant is the largest, and stays
            total = torch.zeros_like(policy.table)
            for p, row in enumerate(drawn):
                for y, log_p in enumerate(row):
                    total += math.exp(log_p) / count * gradient(agent, problem.batch([(p, y)]))
        sizes.append(float(total.abs().max()))
    assert sizes[0] < 1e-6
    assert sizes[0] < 1e-4 * sizes[1]


def test_the_monte_carlo_loss_is_least_at_the_log_of_the_mean():
    returns = torch.tensor([[0.5, 9e9], [-1.0, 9e9], [2.0, 9e9]], dtype=torch.float64)
    lengths = torch.ones(3, dtype=torch.int64)
    best = math.log(sum(math.exp(x) for x in (0.5, -1.0, 2.0)) / 3)
    for c in (0.0, 1.5):
        f = torch.full((3, 2), best, dtype=torch.float64, requires_grad=True)
        loss = monte_carlo_loss(f, returns, lengths, torch.full((3, 2), c))
        (slope,) = torch.autograd.grad(loss, f)
        close(slope[:, 0].sum(), torch.zeros(()).double(), 1e-12)
        close(slope[:, 1], torch.zeros(3).double(), 0.0)


def test_monte_carlo_finds_what_its_first_batch_missed():
    # Worth 60 nats more than all that the constant was made from, and then too high by 60.
    lengths = torch.ones(2, dtype=torch.int64)
    for f, returns in ((0.0, 60.0), (60.0, 0.0)):
        row = torch.full((2, 1), f, requires_grad=True)
        c = torch.full((2, 1), max(0.0, returns - math.log(2)))  # as the agent's running maximum
        loss = monte_carlo_loss(row, torch.full((2, 1), returns), lengths, c)
        (slope,) = torch.autograd.grad(loss, row)
        assert bool(torch.isfinite(slope).all())
        assert bool(((slope < 0) == (f < returns)).all())
    problem = case(((2, 2, None), None, False))
    agent = unclipped("monte-carlo", problem)
    seen = []
    for value in (-40.0, 20.0, -3.0):
        batch = problem.batch()
        batch = rl_ebm.tokens.Batch(
            batch.tokens, batch.lengths, batch.prompt_ids, torch.full_like(batch.reward, value)
        )
        agent.update(batch)
        seen.append(agent.c.clone())
    assert bool((seen[0] < seen[1]).all())
    assert bool((seen[1] == seen[2]).all())


@in_all_kinds
def test_each_prompt_and_position_has_its_own_constant(kind):
    problem = case(kind)
    agent = unclipped("monte-carlo", problem)
    batch = problem.batch()
    agent.update(batch)
    space, ebm = problem.space, problem.ebm
    explorer = Uniform(space) if ebm.reference is None else ebm.reference
    drawn = log_policy(q_values(explorer, space, batch.tokens, batch.prompt_ids)).detach()
    cells = {}
    for i, length in enumerate(batch.lengths.tolist()):
        p, y = int(batch.prompt_ids[i]), batch.tokens[i].tolist()
        log_ref = ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids)[i].tolist()
        for t in range(length):
            # The weight of what follows token t, over the chance that it was drawn.
            after = sum(log_ref[k] - float(drawn[i, k, y[k]]) for k in range(t + 1, length))
            g = float(batch.reward[i]) / ebm.beta + after
            # Without a reference the token itself counts once, whatever its alternatives.
            cells.setdefault((p, t), []).append(math.exp(g))
    for (p, t), values in cells.items():
        assert float(agent.c[p, t]) == pytest.approx(math.log(sum(values) / len(values)), abs=1e-4)
    untouched = agent.c.numel() - len(cells)
    assert int(torch.isneginf(agent.c).sum()) == untouched


def test_the_log_mean_is_each_prompts_own_however_far_apart_they_are():
    x = torch.tensor([-2000.0, -2001.0, 5.0, 3.0])
    got = log_mean_exp(x, torch.tensor([0, 0, 2, 2]), 4).tolist()
    assert got[0] == pytest.approx(-2000 + math.log((1 + math.exp(-1)) / 2))
    assert got[2] == pytest.approx(math.log((math.exp(5) + math.exp(3)) / 2))
    assert got[1] == got[3] == -math.inf
