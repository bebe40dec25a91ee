"""What a reference, a reward shift and the temperature do to the exact solution."""

from __future__ import annotations

import math

import brute_force
import pytest
import torch
from brute_force import INF, SPACES, EnumeratedEBM, random_tables
from toy_policies import close

from rl_ebm import soft_bellman as sb
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SPACES, ids=str)


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def log_pi_of(q):
    return [sb.log_policy(q_t) for q_t in q]


def task(shape, seed):
    """A normalised random reference, and one random score for each response."""
    log_ref = log_pi_of(random_tables(*shape, seed=seed))
    n = TokenSpace(*shape).num_sequences
    reward = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return log_ref, reward


def solve(shape, log_ref, reward, beta):
    """q of r = log_ref, plus R / beta on the last action; and the log-probs of all responses."""
    paid = EnumeratedEBM.of_weights((reward / beta).tolist(), *shape)
    r = [
        a + vector([paid.r[s] for s in states])
        for a, states in zip(log_ref, paid.states, strict=True)
    ]
    q = sb.q_from_r(r, TokenSpace(*shape))
    return q, sb.sequence_log_probs(log_pi_of(q), TokenSpace(*shape))


@in_all_spaces
@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
def test_with_a_reference_log_z_is_the_log_of_its_mean_exponential_reward(shape, beta):
    log_ref, reward = task(shape, seed=20)
    q, log_probs = solve(shape, log_ref, reward, beta)
    log_weights = brute_force.sequence_log_probs(log_ref, shape[2]) + reward / beta
    log_z = brute_force.log_sum_exp(log_weights.tolist())
    close(sb.soft_value(q[0])[0], vector(log_z))
    close(log_probs, log_weights - log_z)


@in_all_spaces
def test_residual_form_the_logits_on_top_of_the_reference_obey_their_own_equation(shape):
    """App. A.5: q(s, a) = R at the end, else log E_{a ~ p_ref(.|s a)} exp q(s a, a)."""
    log_ref, reward = task(shape, seed=21)
    q, _ = solve(shape, log_ref, reward, beta=1.0)
    paid = EnumeratedEBM.of_weights(reward.tolist(), *shape)
    log_pi_ref = {
        s: row
        for states, table in zip(paid.states, log_ref, strict=True)
        for s, row in zip(states, table.tolist(), strict=True)
    }

    def on_top(s, a):
        if (y := (*s, a)) in paid.sequences:
            return paid.r[s][a]
        return brute_force.log_sum_exp(
            [p + on_top(y, b) for b, p in enumerate(log_pi_ref[y]) if p > -INF]
        )

    for states, table in zip(paid.states, q, strict=True):
        for s, row in zip(states, table.tolist(), strict=True):
            for a, p in enumerate(log_pi_ref[s]):
                assert row[a] == (pytest.approx(p + on_top(s, a)) if p > -INF else -INF)


def test_a_uniform_reference_shifts_v_by_log_a_for_each_token_to_come():
    shape = (3, 4, None)
    _, reward = task(shape, seed=22)
    counting = [torch.zeros(3**t, 3).double() for t in range(4)]
    q, log_probs = solve(shape, counting, reward, beta=0.5)
    q_uniform, same = solve(shape, [t - math.log(3) for t in counting], reward, beta=0.5)
    close(log_probs, same)
    for t in range(4):
        close(sb.soft_value(q_uniform[t]), sb.soft_value(q[t]) - (4 - t) * math.log(3))


@in_all_spaces
def test_a_reward_shift_moves_log_z_by_its_share_of_beta_and_nothing_else(shape):
    log_ref, reward = task(shape, seed=23)
    (q, log_probs), (moved, same) = (
        solve(shape, log_ref, x, beta=0.2) for x in (reward, reward + 0.9)
    )
    close(same, log_probs)
    close(sb.soft_value(moved[0]) - sb.soft_value(q[0]), vector([0.9 / 0.2]))


@in_all_spaces
def test_small_beta_is_the_hard_maximum_and_large_beta_the_reference(shape):
    log_ref, reward = task(shape, seed=24)
    q, log_probs = solve(shape, log_ref, reward, beta=1e-5)
    hard = torch.zeros(len(reward)).double()
    hard[reward.argmax()] = 1.0
    close(log_probs.exp(), hard)
    close(1e-5 * sb.soft_value(q[0])[0], reward.max(), tolerance=1e-3)
    _, log_probs = solve(shape, log_ref, reward, beta=1e9)
    close(log_probs, brute_force.sequence_log_probs(log_ref, shape[2]), tolerance=1e-7)
