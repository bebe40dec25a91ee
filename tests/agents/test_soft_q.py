"""Soft Q-learning: returns by their definition, the fixed point, the gradient, both networks."""

from __future__ import annotations

import math

import brute_force
import pytest
import torch
from agent_cases import KIND_IDS, KINDS, WIDE, case, gradient, log_probs, states, train
from toy_policies import close, logits_by_prefix, scores_of, seeded, tabular

import rl_ebm
from rl_ebm.agents import SoftQAgent, SoftQConfig
from rl_ebm.agents.shared.replay import Replay
from rl_ebm.agents.soft_q import lambda_returns, n_step_returns, soft_q_loss
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.tokens import Batch

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
RETURNS = [{"lam": 0.0}, {"lam": 0.3}, {"lam": 1.0}, {"n_step": 1}, {"n_step": 2}, {"n_step": 9}]
EOS_IDS = pytest.mark.parametrize("eos_id", [None, 1], ids=["fixed", "eos"])


def returns_of(r, v, log_pi, lam=1.0, n_step=None):
    """G of one path, from lists of its real length, by the definitions in the docstring."""
    n = len(r)
    if n_step is None:
        g = [0.0] * n
        for t in reversed(range(n)):
            g[t] = r[t]
            if t + 1 < n:
                g[t] += (1 - lam) * v[t + 1] + lam * (g[t + 1] - log_pi[t + 1])
        return g
    out = []
    for t in range(n):
        total = r[t]
        for k in range(1, n_step):
            if t + k < n:
                total += r[t + k] - log_pi[t + k]
        if t + n_step < n:
            total += v[t + n_step]
        out.append(total)
    return out


def random_paths(eos_id, rows=12, steps=5, seed=0):
    """r, V, log pi, lengths: random, and large garbage past the end."""
    g = seeded(seed)
    r, v, log_pi = (torch.randn(rows, steps, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.full((rows,), steps)
    if eos_id is not None:
        lengths = torch.arange(rows) % steps + 1
    past = torch.arange(steps) >= lengths[:, None]
    garbage = (1e5, 1e6, -1e7)
    r, v, log_pi = (x.masked_fill(past, y) for x, y in zip((r, v, log_pi), garbage, strict=True))
    return r, v, log_pi, lengths


def library_returns(r, v, log_pi, lengths, lam=1.0, n_step=None):
    if n_step is not None:
        return n_step_returns(r, v, log_pi, lengths, n_step)
    return lambda_returns(r, v, log_pi, lengths, lam)


# Returns --------------------------------------------------------------------------------------


@EOS_IDS
@pytest.mark.parametrize("how", [*RETURNS, {"n_step": 5}, {"n_step": 4}], ids=str)
def test_returns_follow_their_definition_and_ignore_what_stands_past_the_end(eos_id, how):
    r, v, log_pi, lengths = random_paths(eos_id)
    got = library_returns(r, v, log_pi, lengths, **how)
    for i, n in enumerate(lengths.tolist()):
        want = returns_of(r[i, :n].tolist(), v[i, :n].tolist(), log_pi[i, :n].tolist(), **how)
        close(got[i, :n], torch.tensor(want, dtype=torch.float64))
        close(got[i, n:], torch.zeros(5 - n, dtype=torch.float64), 0.0)


@EOS_IDS
def test_one_step_is_lambda_zero_and_whole_paths_are_lambda_one(eos_id):
    paths = random_paths(eos_id, seed=1)
    close(n_step_returns(*paths, 1), lambda_returns(*paths, 0.0))
    for n in (5, 6, 30):
        close(n_step_returns(*paths, n), lambda_returns(*paths, 1.0))


@EOS_IDS
def test_the_lambda_return_is_the_geometric_mixture_of_n_step_returns(eos_id):
    paths, lam = random_paths(eos_id, seed=2), 0.6
    parts = [(1 - lam) * lam ** (n - 1) * n_step_returns(*paths, n) for n in range(1, 5)]
    close(sum(parts) + lam**4 * n_step_returns(*paths, 5), lambda_returns(*paths, lam))


def test_the_loss_is_half_the_squared_residual_summed_over_tokens_mean_over_rows():
    g, lengths = seeded(3), torch.tensor([3, 1, 2])
    q = torch.randn(3, 3, 4, generator=g, dtype=torch.float64)
    q[1, 2] = -math.inf  # unread
    q[2, 2] = math.nan
    returns = torch.randn(3, 3, generator=g, dtype=torch.float64)
    tokens = torch.randint(4, (3, 3), generator=g)
    want = 0.0
    for i, n in enumerate(lengths.tolist()):
        for t in range(n):
            want += (float(q[i, t, tokens[i, t]]) - float(returns[i, t])) ** 2 / 2 / 3
    close(float(soft_q_loss(q, returns, tokens, lengths)), want)


# The fixed point --------------------------------------------------------------------------------


def exact_returns(problem, policy, how, batch=None, **options):
    agent = SoftQAgent(problem.ebm, policy, SoftQConfig(**how, **options))
    batch = problem.batch() if batch is None else batch
    return agent.returns(
        policy.logits(batch.tokens, batch.prompt_ids), batch, agent.log_weights(batch)
    ), batch


@in_all_kinds
@pytest.mark.parametrize("how", RETURNS, ids=str)
def test_at_the_exact_q_every_path_returns_q(kind, how):
    problem = case(kind)
    got, batch = exact_returns(problem, problem.star(), how)
    for i, (p, n) in enumerate(zip(batch.prompt_ids.tolist(), batch.lengths.tolist(), strict=True)):
        y = tuple(batch.tokens[i, :n].tolist())
        want = [problem.truth[p].q(y[:t])[y[t]] for t in range(n)]
        close(got[i, :n].double(), torch.tensor(want, dtype=torch.float64), 2e-6)


@in_all_kinds
@pytest.mark.parametrize("how", RETURNS, ids=str)
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_the_loss_and_its_gradient_vanish_at_the_solution_and_its_root_is_log_z(kind, how, tau):
    problem = case(kind)
    star = Tabular.from_tables(rl_ebm.solve(problem.ebm).tables(), problem.space, kind[1])
    agent = SoftQAgent(problem.ebm, star, SoftQConfig(tau=tau, **how))
    metrics = agent.update(problem.batch(), 0.5)
    assert float(metrics["losses/loss"]) < 1e-11
    assert float(metrics["losses/grad_norm"]) < 1e-5
    assert float(metrics["losses/root_value"]) == pytest.approx(problem.log_z(), abs=1e-10)


def test_a_shifted_q_is_not_a_fixed_point_though_its_policy_is_the_same():
    problem = case(KINDS[1])
    star = problem.star()
    star.table.data += 1.0
    for how in RETURNS:
        agent = SoftQAgent(problem.ebm, star, SoftQConfig(**how))
        assert float(agent.update(problem.batch(), 1.0)["losses/loss"]) > 0.1


# The gradient -----------------------------------------------------------------------------------


def response_gradients(problem, online, target, how):
    """The gradient of the squared residuals of each response alone, by Python loops."""
    space, found = problem.space, []
    logits = logits_by_prefix(target, space, len(problem.truth))
    rows = {s: i for i, s in enumerate(states(space))}
    for p, truth in enumerate(problem.truth):
        for y in truth.sequences:
            q = [logits[p, y[:t]] for t in range(len(y))]
            v = [brute_force.log_sum_exp(x) for x in q]
            log_pi = [x[a] - v_t for x, v_t, a in zip(q, v, y, strict=True)]
            r = [truth.r[y[:t]][a] for t, a in enumerate(y)]
            gradient = torch.zeros_like(online)
            for t, g in enumerate(returns_of(r, v, log_pi, **how)):
                place = (p, rows[y[:t]], y[t])
                gradient[place] = float(online[place]) - g
            found.append(gradient)
    return torch.stack(found)


@in_all_kinds
@pytest.mark.parametrize("how", RETURNS, ids=str)
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_the_expected_gradient_is_that_of_the_loss_with_the_returns_held_constant(kind, how, tau):
    problem = case(kind)
    policy, target = problem.table(), problem.table(seed=1)
    agent = SoftQAgent(problem.ebm, policy, SoftQConfig(tau=tau, **how, **WIDE))
    target = policy if tau == 1 else target
    count, n = len(problem.truth), len(problem.truth[0].sequences)
    got = []
    for p in range(count):
        for k in range(n):
            if tau != 1:
                agent.target.load_state_dict(target.state_dict())
            got.append(gradient(agent, problem.batch([(p, k)])))
    want = response_gradients(problem, policy.table.detach(), target, how)
    for behaviour in (policy, Uniform(problem.space)):
        b = torch.tensor(log_probs(behaviour, problem.space, count)).double().exp().flatten()
        weight = b[:, None, None, None] / count
        close((weight * torch.stack(got)).sum(0), (weight * want).sum(0), 2e-6)
    # One batch of all of them: their mean.
    if tau == 1:
        close(gradient(agent, problem.batch()), want.mean(0), 2e-6)


def test_the_target_moves_by_tau_after_the_online_network_has_moved():
    problem = case(KINDS[0])
    for tau in (0.25, 0.9):
        agent = SoftQAgent(problem.ebm, problem.table(), SoftQConfig(tau=tau))
        close(agent.target.table, agent.policy.table, 0.0)
        agent.target.table.data.normal_(generator=seeded(5))
        before = agent.target.table.detach().clone()
        agent.update(problem.batch(), 0.3)
        close(agent.target.table.detach(), (1 - tau) * before + tau * agent.policy.table.detach())
    online = SoftQAgent(problem.ebm, problem.table())
    assert online.target is online.policy  # tau = 1


# Replay -----------------------------------------------------------------------------------------


def rows_of(values):
    """Responses that carry their number in every column."""
    x = torch.tensor(values)
    return Batch(x[:, None].expand(-1, 2).clone(), x + 1, x + 2, x.float() / 2)


def contents(replay, seed=0, n=4000):
    drawn = replay.sample(n, seeded(seed))
    x = drawn.reward * 2
    for column, shift in ((drawn.tokens[:, 0], 0), (drawn.tokens[:, 1], 0)):
        close(column.double(), x + shift, 0.0)
    close(drawn.lengths.double(), x + 1, 0.0)
    close(drawn.prompt_ids.double(), x + 2, 0.0)
    return torch.bincount(x.long(), minlength=30)


def test_replay_is_a_ring_of_the_newest_rows_drawn_uniformly():
    replay, added = Replay(6, 2), []
    for values in ([0], [1, 2, 3], [4, 5, 6], list(range(7, 12)), list(range(12, 21)), [21, 22]):
        replay.add(rows_of(values))
        added += values
        kept = added[-6:]
        assert len(replay) == len(kept)
        counts = contents(replay)
        assert counts.nonzero()[:, 0].tolist() == kept
        # 4000 draws: five standard deviations around the uniform count.
        share = 1 / len(kept)
        spread = 5 * math.sqrt(4000 * share * (1 - share))
        assert (counts[kept] - 4000 * share).abs().max() <= spread


def test_replay_keeps_no_reference_to_the_batch_and_asks_for_rewards():
    replay, batch = Replay(3, 2), rows_of([1, 2])
    replay.add(batch)
    batch.tokens.fill_(9)
    assert contents(replay).nonzero()[:, 0].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"no rewards: call ebm\.score"):
        replay.add(Batch(batch.tokens, batch.lengths, batch.prompt_ids))
    problem = case(KINDS[0])
    agent = SoftQAgent(problem.ebm, problem.table(), generator=seeded())
    with pytest.raises(ValueError, match=r"no rewards: call ebm\.score"):
        agent.update(agent.sample())


@in_all_kinds
def test_replayed_rows_join_the_new_ones_with_log_probs_of_the_network_as_it_is_now(kind):
    problem = case(kind)
    config = SoftQConfig(replay_size=64, replay_batch=5, **WIDE)
    agent = SoftQAgent(problem.ebm, problem.table(), config, seeded(1))
    old, new = problem.batch([(0, 0), (0, 3)]), problem.batch([(0, 1), (0, 2), (0, 1)])
    first = gradient(agent, old)
    close(first, gradient(SoftQAgent(problem.ebm, problem.table(), SoftQConfig(**WIDE)), old))
    assert len(agent.replay) == 2
    agent.policy.table.data.copy_(problem.table(seed=7).table.data)
    replayed = agent.replay.sample(5, agent.generator.clone_state())
    got = gradient(agent, new)
    assert len(agent.replay) == 5
    fresh = SoftQAgent(problem.ebm, problem.table(seed=7), SoftQConfig(**WIDE))
    close(got, (3 * gradient(fresh, new) + 5 * gradient(fresh, replayed)) / 8)


# Responses that are impossible --------------------------------------------------------------------


def forbidding(kind):
    shape, prompts, _ = kind
    space = rl_ebm.TokenSpace(*shape)
    scores = scores_of(space, None if prompts is None else len(prompts))
    scores[..., 1] = -math.inf
    return scores


@pytest.mark.parametrize("kind", KINDS[:3], ids=KIND_IDS[:3])
def test_forbidden_weights_are_replaced_and_the_fixed_point_is_the_ebm_with_them_replaced(kind):
    scores = forbidding(kind)
    with pytest.raises(ValueError, match=r"log-weight -inf.*give forbidden_log_weight"):
        SoftQAgent(case(kind, scores=scores).ebm, case(kind).table())
    problem = case(kind, scores=scores, floor=-9.0)
    for how in RETURNS:
        config = SoftQConfig(forbidden_log_weight=-9, **how)
        metrics = SoftQAgent(problem.ebm, problem.star(), config).update(problem.batch(), 0.5)
        assert float(metrics["losses/loss"]) < 1e-10
        assert float(metrics["losses/root_value"]) == pytest.approx(problem.log_z(), abs=1e-10)


def test_tokens_that_the_reference_forbids_are_replaced_too():
    kind = ((3, 3, 1), None, True)
    reference = tabular(rl_ebm.TokenSpace(*kind[0]), seed=4)
    reference.table.data[0, 1, 2] = -math.inf
    problem = case(kind, reference=reference, floor=-7.0)
    with pytest.raises(ValueError, match="forbidden_log_weight"):
        SoftQAgent(problem.ebm, problem.table())
    config = SoftQConfig(forbidden_log_weight=-7.0)
    agent = SoftQAgent(problem.ebm, problem.star(), config)
    assert float(agent.update(problem.batch(), 0.5)["losses/loss"]) < 1e-10


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e39, 1e300, -1.1e15])
def test_what_stands_for_minus_infinity_is_finite_and_so_is_its_square(value):
    problem, config = case(KINDS[0]), SoftQConfig(forbidden_log_weight=value)
    said = "be within 1e\\+15 nats of 0" if math.isfinite(value) else "be finite"
    with pytest.raises(ValueError, match=f"forbidden_log_weight must {said}"):
        SoftQAgent(problem.ebm, problem.table(), config)


# Learning -----------------------------------------------------------------------------------------


REPLAY = {"explore": 0, "replay_size": 999, "replay_batch": 128}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "network", "options"),
    [
        (KINDS[1], False, {}),
        (KINDS[3], False, {"lam": 0.5}),
        pytest.param(KINDS[2], False, {"n_step": 2, "tau": 0.5}, marks=pytest.mark.slow),
        pytest.param(KINDS[3], False, REPLAY, marks=pytest.mark.slow),
        pytest.param(KINDS[2], True, {}, marks=pytest.mark.slow),
    ],
    ids=["whole-paths", "lambda", "n-step-target", "replay", "transformer"],
)
def test_it_reaches_the_ebm_and_log_z_from_a_random_start(kind, network, options):
    problem = case(kind)
    policy = problem.network() if network else problem.table(dtype=torch.float32)
    assert problem.kl(policy) > 0.1
    config = SoftQConfig(batch_size=512, lr=1e-2 if network else 0.2, **options)
    agent = SoftQAgent(problem.ebm, policy, config, seeded(2))
    train(agent, problem.ebm, 250)
    assert problem.kl(policy) < 2e-3
    logits = logits_by_prefix(policy, problem.space, len(problem.truth))
    for p, truth in enumerate(problem.truth):
        assert brute_force.log_sum_exp(logits[p, ()]) == pytest.approx(truth.log_z, abs=0.05)
