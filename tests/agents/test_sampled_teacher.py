"""Samples of the EBM from scored proposals: resampling and chains."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, unclipped
from toy_policies import close, responses, seeded

from rl_ebm.agents.sampled_teacher import accepts, resample

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)


def test_rows_are_drawn_again_by_their_weight_within_their_prompt():
    ids = torch.tensor([0, 1, 0, 1, 0] * 4000)
    log_w = torch.tensor([0.0, 1.0, 2.0, -math.inf, -1.0] * 4000)
    rows = resample(log_w, ids, 3, seeded())
    assert torch.equal(ids[rows], ids)
    kinds = torch.bincount(rows[ids == 0] % 5, minlength=5).double()
    want = torch.tensor([1.0, 0.0, math.exp(2), 0.0, math.exp(-1)]).double()
    close(kinds / kinds.sum(), want / want.sum(), 0.02)
    assert set((rows[ids == 1] % 5).tolist()) == {1}
    alone = resample(torch.full((3,), -math.inf), torch.tensor([0, 0, 1]), 2, seeded())
    assert torch.isin(alone[:2], torch.tensor([0, 1])).all()
    assert int(alone[2]) == 2


def test_a_chain_moves_with_the_ratio_of_the_weights():
    n = 20_000
    new, old = torch.full((n,), -1.0), torch.full((n,), 0.5)
    share = accepts(new, old, seeded()).float().mean()
    assert float(share) == pytest.approx(math.exp(-1.5), abs=0.01)
    assert bool(accepts(old, new, seeded()).all())
    impossible = torch.full((n,), -math.inf)
    assert bool(accepts(new, impossible, seeded()).all())
    assert not bool(accepts(impossible, new, seeded()).any())


@in_all_kinds
@pytest.mark.parametrize("source", [pytest.param("reference", marks=pytest.mark.slow), "policy"])
def test_the_chains_come_to_draw_from_the_ebm(kind, source):
    problem = case(kind)
    agent = unclipped("sampled-teacher", problem, method="mcmc", source=source, batch_size=3000)
    agent.policy.requires_grad_(False)
    agent.policy.table.mul_(0.3)  # a proposal that is far off needs many steps
    count, n = len(problem.truth), len(responses(problem.space))
    for _ in range(60):
        chains = agent._mcmc(problem.ebm.score(agent.sample()))
    index = problem.space.sequence_indices(chains.tokens, chains.lengths)
    seen = torch.zeros(count, n, dtype=torch.float64)
    seen.index_put_((chains.prompt_ids, index), torch.ones(3000).double(), accumulate=True)
    star = problem.star_log_probs().exp()
    shares = seen / seen.sum(1, keepdim=True)
    start = (torch.full_like(star, 1 / n) - star).abs().sum(1) / 2
    assert float(start.min()) > 0.15
    assert float(((shares - star).abs().sum(1) / 2).max()) < 0.08


def test_chains_are_saved_and_go_on():
    problem = case(KINDS[3])
    one = unclipped("sampled-teacher", problem, method="mcmc", batch_size=30)
    for k in range(3):
        one.update(problem.ebm.score(one.sample()), k / 10)
    other = unclipped("sampled-teacher", problem, method="mcmc", batch_size=30)
    other.load_state_dict(one.state_dict())
    close(other.chains.tokens, one.chains.tokens, 0.0)
    assert torch.equal(other.sample().prompt_ids, one.chains.prompt_ids)
