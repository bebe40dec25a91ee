"""Backups over the seen: the gradient with no tree, some of it, all of it; rewards asked once."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, gradient, log_probs, make, train, unclipped
from toy_policies import close, responses, seeded

import rl_ebm
from rl_ebm.agents.shared.learner import immediate_log_weights, token_values
from rl_ebm.agents.tree_backup import tree_backup_loss, tree_errors
from rl_ebm.policies import Uniform
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)


def agent_of(problem, policy=None, **options):
    return unclipped("tree-backup", problem, policy, **({"batch_size": 12} | options))


def filled(agent, batch):
    """The agent, with a tree of these responses."""
    with torch.no_grad():
        q = q_values(agent.policy, agent.ebm.space, batch.tokens, batch.prompt_ids)
        r = immediate_log_weights(agent.ebm, batch, None, torch.float64)
        agent.tree.add(batch, agent.tree.path(batch), r, token_values(log_policy(q), batch))
    return agent


@in_all_kinds
def test_where_nothing_was_seen_it_is_vargrad(kind):
    problem = case(kind)
    batch = problem.batch()
    mine = gradient(agent_of(problem), batch)
    close(mine, gradient(unclipped("vargrad", problem, batch_size=12), batch), 1e-5)


@in_all_kinds
def test_where_all_was_seen_the_gradient_is_that_of_the_kl_of_every_state_without_noise(kind):
    problem = case(kind)
    batch = problem.batch()
    agent = filled(agent_of(problem, batch_size=1, explore=0.0), batch)
    n = len(responses(problem.space))
    for prompt, k in ((0, 0), (len(problem.truth) - 1, n - 1), (0, n // 2)):
        one = problem.batch([(prompt, k)])
        got = gradient(agent, one)
        policy, star = problem.table(), problem.star()
        q = q_values(policy, problem.space, one.tokens, one.prompt_ids)
        want = q_values(star, problem.space, one.tokens, one.prompt_ids).detach()
        log_pi, log_star = log_policy(q), log_policy(want)
        real = one.mask[..., None] & ~torch.isneginf(log_pi)
        gap = (log_pi - log_star).masked_fill(~real, 0.0)
        kl = (log_pi.exp() * gap).masked_fill(~real, 0.0).sum()
        (wanted,) = torch.autograd.grad(kl, policy.table)
        close(got, wanted, 1e-5)


@in_all_kinds
@pytest.mark.parametrize("explores", [False, True])
def test_of_anybody_elses_draw_it_is_the_exact_error_by_who_drew_it(kind, explores):
    problem = case(kind)
    batch = problem.batch()
    agent = filled(agent_of(problem, batch_size=1 if explores else 9, explore=1.0), batch)
    one = problem.batch([(len(problem.truth) - 1, 1)])
    got = gradient(agent, one)
    policy, star = problem.table(), problem.star()
    q = q_values(policy, problem.space, one.tokens, one.prompt_ids)
    log_star = log_policy(q_values(star, problem.space, one.tokens, one.prompt_ids)).detach()
    log_pi, total, wanted = log_policy(q), 0.0, 0.0
    explorer = problem.ebm.reference or Uniform(problem.space)
    mu = log_policy(q_values(explorer, problem.space, one.tokens, one.prompt_ids)).detach().exp()
    for t, drawn in enumerate(one.tokens[0, : int(one.lengths[0])].tolist()):
        ratio = log_pi[0, t].detach() - log_star[0, t]
        for a in range(problem.space.vocab_size) if explores else [drawn]:
            if mu[0, t, a] > 0:
                share = mu[0, t, a] if explores else 1.0
                wanted = wanted + share * (total + ratio[a]) * log_pi[0, t, a]
        total = total + float(ratio[drawn])  # of the prefix
    (wanted,) = torch.autograd.grad(wanted, policy.table)
    close(got, wanted, 1e-5)


@pytest.mark.slow
def test_what_the_policy_has_given_up_comes_back_by_who_still_draws_it():
    problem = case(KINDS[0])
    policy = problem.table()
    with torch.no_grad():
        policy.table[..., 0] += 10.0
    agent = make("tree-backup", problem, policy, batch_size=16, explore=0.5, lr=0.1)
    train(agent, problem.ebm, 500)
    assert problem.kl(agent.policy) < 0.05


def test_a_constant_in_the_reward_changes_nothing():
    problem = case(KINDS[0])
    batch = problem.batch()
    shifted = batch.with_reward(batch.rewards().double() + 1e8)
    close(gradient(agent_of(problem), batch), gradient(agent_of(problem), shifted), 1e-5)
    agents = [filled(agent_of(problem), x) for x in (batch, shifted)]
    one, other = (gradient(a, x) for a, x in zip(agents, (batch, shifted), strict=True))
    close(one, other, 1e-5)


@in_all_kinds
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_at_the_ebm_every_error_is_zero_whatever_was_seen(kind, share):
    problem = case(kind)
    everything = problem.batch()
    count = int(share * len(everything))
    agent = agent_of(problem, problem.star())
    if count:
        order = torch.randperm(len(everything), generator=seeded(2))[:count]
        filled(agent, everything.take(order))
    metrics = agent.update(everything)
    assert float(metrics["losses/loss"]) < 1e-9
    log_z = torch.tensor([t.log_z for t in problem.truth], dtype=torch.float64)
    close(agent.learned_log_z(), log_z, 1e-4)


@in_all_kinds
def test_in_expectation_the_known_part_takes_nothing_away(kind):
    """With the tree and log Z fixed, the policy's own draws have the mean gradient of e_y alone."""
    problem = case(kind)
    policy, everything = problem.table(), problem.batch()
    prompts, n = len(problem.truth), len(responses(problem.space))
    order = torch.randperm(len(everything), generator=seeded(4))[: len(everything) // 3]
    agent = filled(agent_of(problem, policy), everything.take(order))
    q = q_values(policy, problem.space, everything.tokens, everything.prompt_ids)
    log_pi = log_policy(q)
    rows = log_pi.detach()
    tree = agent.tree.backup(agent.tree.path(everything), rows)
    r = immediate_log_weights(problem.ebm, everything, None).double()
    log_z = torch.linspace(-1, 2, prompts, dtype=torch.float64)[everything.prompt_ids]
    known, judged = tree_errors(log_z, everything, r, rows, tree)
    errors = rows.exp(), known, judged - token_values(known, everything)
    pi = torch.tensor(log_probs(policy, problem.space, prompts)).exp().flatten()
    got = sum(
        pi[i]
        * tree_backup_loss(
            log_pi[i : i + 1], everything.take(torch.tensor([i])), *(x[i : i + 1] for x in errors)
        )
        for i in range(prompts * n)
    )
    (got,) = torch.autograd.grad(got, policy.table, retain_graph=True)
    want = 0.0
    for i, row in enumerate(everything.tokens.tolist()):
        length, value = int(everything.lengths[i]), float(log_z[i])
        path = [float(rows[i, t, row[t]] - r[i, t]) for t in range(length)]
        total = value + sum(path)
        for t in range(length):
            value += path[t]
            a = row[t]
            # Of the child: what was seen, and the rest by the return of this response.
            seen = math.exp(float(tree.log_w[i, t, a] - r[i, t]))
            rest = float(tree.u[i, t, a]) * math.exp(value - total)
            want = want + pi[i] * (value - math.log(seen + rest)) * log_pi[i, t, a]
    (wanted,) = torch.autograd.grad(want, policy.table)
    close(got, wanted, 1e-5)


@in_all_kinds
def test_a_reward_is_asked_for_once(kind):
    problem = case(kind)
    calls = []
    table = {
        (p, y): float(problem.batch([(p, k)]).rewards())
        for p in range(len(problem.truth))
        for k, y in enumerate(responses(problem.space))
    }

    def reward(tokens, lengths, prompt_ids=None):
        ids = [0] * len(tokens) if prompt_ids is None else prompt_ids.tolist()
        rows = zip(ids, tokens.tolist(), lengths.tolist(), strict=True)
        asked = [(p, tuple(y[:length])) for p, y, length in rows]
        calls.extend(asked)
        return torch.tensor([table[x] for x in asked])

    ebm = rl_ebm.EBM(problem.space, reward, 0.7, problem.ebm.reference, problem.ebm.prompts)
    entry = rl_ebm.agents.AGENTS["tree-backup"]
    agent = entry.agent(ebm, problem.table(), entry.config(batch_size=12), seeded(), None)
    calls.clear()
    total = 0
    for _ in range(4):
        batch = agent.sample()
        scored, asked = agent.score(batch)
        total += asked
        close(scored.rewards(), problem.ebm.score(batch).rewards(), 1e-6)
        agent.update(scored)
    assert len(calls) == total == len(set(calls)) == agent.tree.responses


def test_a_run_counts_what_it_asked_for_and_what_it_knew(tmp_path):
    ebm = case(KINDS[0]).ebm
    options = rl_ebm.agents.AGENTS["tree-backup"].config(batch_size=16)
    rl_ebm.train(ebm, "tree-backup", tmp_path / "r", options=options, steps=30)
    head, *lines = (tmp_path / "r" / "metrics.csv").read_text().splitlines()
    last = dict(zip(head.split(","), lines[-1].split(","), strict=True))
    assert int(last["reward_calls"]) + int(last["looked_up"]) == 30 * 16
    assert 20 <= int(last["reward_calls"]) <= 27


@pytest.mark.slow
@in_all_kinds
def test_it_ends_at_the_ebm_without_noise(kind):
    problem = case(kind)
    agent = make("tree-backup", problem, problem.table(), batch_size=32, lr=0.1)
    train(agent, problem.ebm, 400)
    assert problem.kl(agent.policy) < 1e-4


@pytest.mark.slow
def test_with_little_memory_it_goes_on_and_ends_at_the_ebm():
    problem = case(KINDS[0])
    agent = make("tree-backup", problem, problem.table(), batch_size=4, memory=26, lr=0.1)
    most, before = 0, problem.kl(agent.policy)
    for k in range(300):
        agent.update(problem.ebm.score(agent.sample()), k / 300)
        most = max(most, agent.tree.size)
    assert most <= 26
    assert problem.kl(agent.policy) < 0.1 * before


@pytest.mark.slow
def test_weights_of_minus_infinity_have_a_stand_in_and_leave_no_nan():
    scores = torch.randn(27, generator=seeded(3))
    scores[::4] = -math.inf
    problem = case(KINDS[0], scores=scores, floor=-8.0)
    agent = make(
        "tree-backup", problem, problem.table(), batch_size=32, lr=0.1, forbidden_log_weight=-8.0
    )
    train(agent, problem.ebm, 150)
    assert problem.kl(agent.policy) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_size": 8}, "keeps every response"),
        ({"anneal": 0.1}, "keeps every response"),
        ({"memory": 0}, "memory must be in"),
        ({"memory": 40}, "prefixes of two steps, 74"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        agent_of(case(KINDS[0]), **options)
