"""What agents do beyond a first step, with several prompts, and with sizes that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KINDS, case, make
from toy_policies import close, seeded

from rl_ebm.agents.best_of_n import best_of_groups
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.agents.ppo import PPOConfig, clipped_loss
from rl_ebm.agents.shared.kl_penalty import PenaltyOptions
from rl_ebm.agents.shared.learner import EXTRA, learning_rate
from rl_ebm.training.charts import Drawn, batch_charts


def random_rows(batch, seed):
    """Log-probabilities of the tokens of a batch, 0 past the end."""
    g = seeded(seed)
    rows = -torch.rand(batch.tokens.shape, generator=g, dtype=torch.float64) - 0.1
    return rows.masked_fill(~batch.mask, 0.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_advantage_stays_that_of_the_draw_over_all_epochs(estimator):
    problem = case(KINDS[1])
    batch = problem.batch()
    agent = make("ppo", problem, kl_estimator=estimator, clip=0.2)
    log_pi, old, log_ref = (random_rows(batch, seed) for seed in (1, 2, 3))
    gain = torch.randn(len(batch), generator=seeded(4), dtype=torch.float64)
    kappa = {"k1": lambda u: u, "k2": lambda u: u * u / 2, "k3": lambda u: math.exp(-u) - 1 + u}
    returns = [
        float(gain[i]) - sum(kappa[estimator](float(old[i, t] - log_ref[i, t])) for t in range(n))
        for i, n in enumerate(batch.lengths.tolist())
    ]
    want = 0.0
    for i, n in enumerate(batch.lengths.tolist()):
        a = returns[i] - (sum(returns) - returns[i]) / (len(returns) - 1)
        for t in range(n):
            ratio = math.exp(float(log_pi[i, t] - old[i, t]))
            want -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / len(returns)
    got = agent.loss(batch, log_pi, old, log_ref, gain)
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_a_mean_over_tokens_is_over_those_of_the_response():
    problem = case(KINDS[1])
    batch = problem.batch()
    lengths = batch.lengths
    assert len(set(lengths.tolist())) > 1
    log_pi, log_ref = random_rows(batch, 1), random_rows(batch, 2)
    gain = torch.randn(len(batch), generator=seeded(4), dtype=torch.float64)
    n = len(batch)
    want = 0.0
    for i, length in enumerate(lengths.tolist()):
        mean_log_pi = sum(float(log_pi[i, t]) for t in range(length)) / length
        want -= float(gain[i]) * mean_log_pi / n
    options = PenaltyOptions(kl_in="loss", baseline="none", reduce_tokens="mean", kl_estimator="k1")
    penalty = sum(
        sum(float(log_pi[i, t] - log_ref[i, t]) for t in range(length)) / length / n
        for i, length in enumerate(lengths.tolist())
    )
    got = policy_gradient_loss(log_pi, log_ref, gain, lengths, batch.prompt_ids, 1, options)
    assert float(got) == pytest.approx(want + penalty, rel=1e-12)
    clipped = PPOConfig(kl_in="loss", baseline="none", reduce_tokens="mean", kl_estimator="k1")
    got = clipped_loss(log_pi, log_pi, log_ref, gain, lengths, clipped)  # all ratios are 1
    assert float(got) == pytest.approx(penalty - float(gain.mean()), rel=1e-12)


def test_a_learned_log_z_moves_faster_than_the_policy():
    # Adam's first step is the learning rate wherever there is a gradient, whatever its size.
    problem = case(KINDS[3])
    agent = make("trajectory-balance", problem, lr=1e-3)
    table, log_z = agent.policy.table.detach().clone(), agent.log_z.detach().clone()
    agent.update(problem.batch(), 0.3)
    rate = learning_rate(1e-3, 0.3)
    moved = (agent.policy.table.detach() - table).abs().max()
    assert float(moved) == pytest.approx(rate, rel=1e-3)
    close((agent.log_z.detach() - log_z).abs(), torch.full_like(log_z, EXTRA * rate), 1e-3 * rate)


@pytest.mark.parametrize("explore", [0.5, 1.0])
def test_a_step_of_whole_groups_is_shared_between_its_drawers(explore):
    # Two groups of 6 fit into 16: the explorer's share is of the 12 that are drawn.
    problem = case(KINDS[3])
    agent = make("vargrad", problem, batch_size=16, group_size=6, explore=explore)
    batch = problem.ebm.score(agent.sample())
    assert len(batch) == 12
    assert agent.explored == round(12 * explore)
    own = agent.own_rows
    assert own is None if explore == 1 else own == slice(6, None)
    found = batch_charts(Drawn.of(agent, batch), problem.ebm.num_prompts)
    assert ("charts/episodic_return" in found) == (explore < 1)
    assert all(math.isfinite(float(x)) for x in found.values())


def test_a_target_network_is_saved_and_goes_on():
    problem = case(KINDS[1])
    one = make("soft-q", problem, tau=0.25)
    for k in range(3):
        one.update(problem.batch(), k / 10)
    assert float((one.target.table - one.policy.table).detach().abs().max()) > 1e-4
    other = make("soft-q", problem, problem.table(seed=9), tau=0.25)
    other.load_state_dict(one.state_dict())
    close(other.target.table.detach(), one.target.table.detach(), 0.0)


def test_matching_weighs_each_response_by_the_z_of_its_own_prompt():
    problem = case(KINDS[3])
    batch = problem.batch()
    agent = make("dpg", problem, z_decay=0.0)  # Z is the batch's alone
    log_pi, log_ref = random_rows(batch, 1), random_rows(batch, 2)
    shift = torch.tensor([0.0, 3.0, -2.0], dtype=torch.float64)[batch.prompt_ids]
    gain = torch.randn(len(batch), generator=seeded(4), dtype=torch.float64) + shift
    ids = batch.prompt_ids.tolist()
    ratio = [math.exp(float(gain[i] + log_ref[i].sum() - log_pi[i].sum())) for i in range(len(ids))]
    want = 0.0
    for p in set(ids):
        mine = [i for i, q in enumerate(ids) if q == p]
        z = sum(ratio[i] for i in mine) / len(mine)
        slope = {i: -ratio[i] / z for i in mine}
        for i in mine:
            others = (sum(slope.values()) - slope[i]) / (len(mine) - 1)
            want += (slope[i] - others) * float(log_pi[i].sum()) / len(ids)
    got = agent.loss(batch, log_pi, log_pi, log_ref, gain)
    assert float(got) == pytest.approx(want, rel=1e-5)  # log Z is kept in float32


def test_the_best_of_an_unfinished_group_is_one_of_its_rows():
    reward = torch.tensor([-3.0, -1.0, -2.0, -5.0, -4.0])
    assert best_of_groups(reward, 3).tolist() == [1, 4]
    assert best_of_groups(reward[:4], 3).tolist() == [1, 3]


def test_a_row_with_another_prompt_is_a_new_chain():
    problem = case(KINDS[3])
    agent = make("sampled-teacher", problem, method="mcmc", batch_size=6)
    for prompt in (0, 2, 2, 1):
        before = agent.chains
        batch = problem.batch([(prompt, k) for k in (0, 3, 1, 6, 2, 5)])
        stayed = before is not None and int(before.prompt_ids[0]) == prompt
        agent.update(batch)
        assert torch.equal(agent.chains.prompt_ids, batch.prompt_ids)
        if not stayed:  # nothing that answers another prompt is kept
            assert torch.equal(agent.chains.tokens, batch.tokens)
            close(agent.chains.rewards(), batch.rewards().double(), 0.0)
