"""The tree of the seen: against sums over responses in Python, whatever was seen, kept or lost."""

from __future__ import annotations

import math

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, log_probs
from brute_force import log_softmax
from toy_policies import close, logits_by_prefix, responses, seeded

from rl_ebm.agents.shared.key_table import KeyTable
from rl_ebm.agents.shared.learner import immediate_log_weights, token_values
from rl_ebm.agents.shared.seen_tree import SeenTree
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)


def tree_of(problem, room=2**20):
    return SeenTree(problem.ebm.num_prompts, problem.space.vocab_size, room)


def read(problem, policy, batch):
    """r of the tokens, and log pi at the states, of responses."""
    with torch.no_grad():
        rows = log_policy(q_values(policy, problem.space, batch.tokens, batch.prompt_ids))
    return immediate_log_weights(problem.ebm, batch, None), rows


def put(tree, problem, policy, batch):
    """Back up, add responses, and back up again, which changes nothing more at their states."""
    r, rows = read(problem, policy, batch)
    path = tree.path(batch)
    tree.backup(path, rows)
    path = tree.add(batch, path, r, token_values(rows, batch))
    close(tree.path(batch), path, 0)
    before = {name: tree.columns[name][: tree.size].clone() for name in ("log_w", "u")}
    found = tree.backup(path, rows)
    for name, column in before.items():
        close(tree.columns[name][: tree.size], column, 1e-12)
    return found


def some(problem, count, seed=0):
    """Different responses, each to a prompt of its own choice; at least one is left out."""
    n, prompts = len(responses(problem.space)), len(problem.truth)
    order = torch.randperm(n * prompts, generator=seeded(seed))[:count].tolist()
    return [(k // n, k % n) for k in order[: n * prompts - 1]]


def log_sum(terms):
    top = max(terms, default=-math.inf)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(x - top) for x in terms))


def check(tree, problem, policy, rows):
    """Every child of every state: the tree against sums over all responses in Python."""
    everything, prompts = responses(problem.space), len(problem.truth)
    batch = problem.batch()
    _, log_pi = read(problem, policy, batch)
    found = tree.backup(tree.path(batch), log_pi)
    pi = log_probs(policy, problem.space, prompts)
    reference = problem.ebm.reference
    ref = None if reference is None else logits_by_prefix(reference, problem.space, prompts)
    for i, (p, y) in enumerate((p, y) for p in range(prompts) for y in everything):
        for t in range(len(y)):
            way = 0.0 if ref is None else sum(log_softmax(ref[p, y[:j]])[y[j]] for j in range(t))
            for a in range(problem.space.vocab_size):
                below = [k for k, z in enumerate(everything) if z[: t + 1] == (*y[:t], a)]
                if not below:  # the end is forced at the last place
                    continue
                truth = problem.truth[p]
                seen = [truth.log_probs[k] + truth.log_z - way for k in below if (p, k) in rows]
                got, want = float(found.log_w[i, t, a]), log_sum(seen)
                assert got == want or abs(got - want) < 1e-5
                mass = log_sum([pi[p][k] for k in below])
                unseen = [math.exp(pi[p][k] - mass) for k in below if (p, k) not in rows]
                assert float(found.u[i, t, a]) == pytest.approx(math.fsum(unseen), abs=1e-6)


@in_all_kinds
@pytest.mark.parametrize("count", [1, 7, 14])
def test_values_below_every_child_are_those_of_the_seen_responses(kind, count):
    problem = case(kind)
    policy, rows = problem.table(), some(problem, count)
    tree = tree_of(problem)
    for part in (
        rows[: len(rows) // 2],
        rows[len(rows) // 2 :],
        rows[:2],
    ):  # the last are known already
        if part:
            put(tree, problem, policy, problem.batch(part, pad=1))
    assert tree.responses == len(rows)
    check(tree, problem, policy, set(rows))
    other = problem.table(seed=3)  # W stays, U follows the policy where it is visited
    check(tree, problem, other, set(rows))


@in_all_kinds
def test_where_all_was_seen_the_values_are_the_exact_ones_and_nothing_is_left(kind):
    problem = case(kind)
    tree = tree_of(problem)
    for seed in range(2):
        got = put(tree, problem, problem.table(seed), problem.batch())
    star = problem.star()
    batch = problem.batch()
    q = q_values(star, problem.space, batch.tokens, batch.prompt_ids)
    real = batch.mask[..., None] & ~torch.isneginf(q)
    close(got.log_w[real], q.detach()[real].double(), 1e-5)
    assert float(got.u[real].abs().max()) == 0.0
    assert float(got.root_u.abs().max()) == 0.0
    log_z = torch.tensor([t.log_z for t in problem.truth], dtype=torch.float64)
    close(got.root_log_w, log_z[batch.prompt_ids], 1e-5)


@in_all_kinds
def test_a_reward_is_known_once_it_was_seen(kind):
    problem = case(kind)
    tree, rows = tree_of(problem), some(problem, 6)
    batch = problem.batch()
    assert bool(tree.rewards(batch).isnan().all())
    put(tree, problem, problem.table(), problem.batch(rows))
    n = len(responses(problem.space))
    seen = torch.zeros(len(batch), dtype=torch.bool)
    seen[[p * n + k for p, k in rows]] = True
    got = tree.rewards(batch)
    assert bool((got.isnan() == ~seen).all())
    close(got[seen], batch.rewards()[seen].double(), 0.0)


@in_all_kinds
def test_what_is_forgotten_costs_least_and_the_rest_is_as_if_it_had_been_seen_alone(kind):
    problem = case(kind)
    policy, rows = problem.table(), some(problem, 16)
    tree = tree_of(problem)
    put(tree, problem, policy, problem.batch(rows))
    tree.room = tree.size  # full
    log_z = torch.tensor([t.log_z for t in problem.truth], dtype=torch.float64)
    tree.forget(0, log_z)
    assert tree.responses == len(rows)  # there was room
    pi = log_probs(policy, problem.space, len(problem.truth))
    tree.forget(1, log_z)
    assert tree.size <= tree.room - 1
    cost = {
        (p, k): abs(math.exp(problem.truth[p].log_probs[k]) - math.exp(pi[p][k])) for p, k in rows
    }
    known = [row for row in rows if not bool(tree.rewards(problem.batch([row])).isnan().any())]
    assert 0 < len(known) == tree.responses < len(rows)
    lost = set(rows) - set(known)
    assert max(cost[row] for row in lost) <= min(cost[row] for row in known) + 1e-7
    check(tree, problem, policy, set(known))
    put(tree, problem, policy, problem.batch(rows))  # and they can all come back
    check(tree, problem, policy, set(rows))


def test_a_tree_goes_on_from_its_state_and_refuses_what_is_none():
    problem = case(KINDS[3])
    tree, rows = tree_of(problem), some(problem, 9)
    put(tree, problem, problem.table(), problem.batch(rows))
    state = tree.state_dict()
    other = tree_of(problem)
    other.load_state_dict(state)
    assert other.responses == 9
    assert all(bool((state[k] == v).all()) for k, v in other.state_dict().items())
    check(other, problem, problem.table(), set(rows))
    keys = state["keys"]
    for wrong, message in (
        ({"keys": keys.roll(1)}, "without a parent"),
        ({"keys": torch.cat([keys[:-1], keys[:1]])}, "twice"),
        ({"keys": keys - 10**6}, "without a parent"),
        ({"u": state["u"][1:]}, "or a column"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_of(problem).load_state_dict(state | wrong)


@pytest.mark.parametrize("step", [1, 2**20, 2**43 + 1])
def test_a_key_table_is_a_dictionary(step):
    table, known, g = KeyTable(room=4), {}, seeded(1)
    for _ in range(6):
        keys = torch.randint(10**6, (500,), generator=g).unique() * step
        new = torch.tensor([k for k in keys.tolist() if k not in known], dtype=torch.int64)
        values = torch.randint(2**40, (len(new),), generator=g)
        table.add(new, values)
        known |= dict(zip(new.tolist(), values.tolist(), strict=True))
        asked = torch.cat([keys, keys + step, torch.tensor([-1, -7])]).reshape(-1, 2)
        want = [[known.get(k, -1) for k in row] for row in asked.tolist()]
        assert table.find(asked).tolist() == want
    assert table.find(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
