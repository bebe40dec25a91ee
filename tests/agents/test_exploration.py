"""Who draws the responses of agents that learn from anybody's: exploration, epsilon, replay."""

from __future__ import annotations

import pytest
import torch
from agent_cases import KINDS, case, make
from toy_policies import close


def constant(problem, token):
    """A policy that writes one token, whatever came before."""
    policy = problem.table()
    policy.table.data.fill_(-60.0)
    policy.table.data[..., token] = 60.0
    return policy


def test_epsilon_is_of_the_policys_own_draws():
    problem = case(((3, 3, None), None, True), reference=constant(case(KINDS[0]), 2))
    options = {"batch_size": 400, "explore": 0.5, "epsilon": 1.0}
    agent = make("vargrad", problem, constant(problem, 1), **options)
    counts = torch.bincount(agent.sample().tokens.flatten(), minlength=3).tolist()
    assert counts[2] > 600 + 130  # the explorer's all, and a third of the policy's
    assert min(counts[:2]) > 130
    assert counts[0] < 270


@pytest.mark.parametrize("explore", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("prompts", [None, [[], [5]]], ids=["", "prompts"])
def test_soft_q_explores_with_its_share_of_the_reference(explore, prompts):
    kind = ((3, 3, None), prompts, True)
    problem = case(kind)
    problem = case(kind, reference=constant(problem, 2))
    options = {"batch_size": 200, "explore": explore}
    agent = make("soft-q", problem, constant(problem, 1), **options)
    batch = agent.sample()
    assert len(batch) == 200
    assert (batch.tokens == batch.tokens[:, :1]).all()
    written = torch.bincount(batch.tokens[:, 0], minlength=3).tolist()
    assert written == [0, 200 - round(200 * explore), round(200 * explore)]
    if prompts is not None:
        assert torch.bincount(batch.prompt_ids).tolist() == [100, 100]
        if 0 < explore < 1:  # both write to both
            pairs = set(zip(batch.tokens[:, 0].tolist(), batch.prompt_ids.tolist(), strict=True))
            assert pairs == {(1, 0), (1, 1), (2, 0), (2, 1)}


def test_without_a_reference_soft_q_explores_uniformly():
    problem = case(KINDS[0])
    agent = make("soft-q", problem, constant(problem, 1), batch_size=5400, explore=0.5)
    tokens = agent.sample().tokens
    counts = torch.bincount((tokens * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    counts[13] -= 2700  # the policy's own: 1 1 1
    # 100 of each are expected; five standard deviations.
    assert (counts - 100).abs().max() <= 50


def test_a_state_is_a_copy_of_the_replay_and_the_ring_goes_on_where_it_was():
    problem = case(KINDS[0])
    options = {"replay_size": 5, "replay_batch": 2}
    a, b = (make("soft-q", problem, **options) for _ in range(2))
    for rows in ([(0, k) for k in range(4)], [(0, k) for k in range(4, 7)]):
        a.update(problem.batch(rows))
    state = a.state_dict()
    saved = [column.clone() for column in state["replay"]["columns"]]
    for k in (8, 7):
        a.update(problem.batch([(0, k)]))
    for column, was in zip(state["replay"]["columns"], saved, strict=True):
        close(column, was, 0.0)
    b.load_state_dict(state)
    b.update(problem.batch([(0, 8)]))
    b.update(problem.batch([(0, 7)]))
    close(b.replay.rows.tokens, a.replay.rows.tokens, 0.0)
    kept = a.replay.rows.tokens @ torch.tensor([9, 3, 1])
    assert sorted(kept.tolist()) == [4, 5, 6, 7, 8]
