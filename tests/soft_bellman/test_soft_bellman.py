"""The soft Bellman equations against enumeration, their inverse, their gradients, their limits.

Tables start random: zero tables would hide a forgotten term. Names follow arXiv 2512.15605.
"""

from __future__ import annotations

import math

import brute_force
import pytest
import torch
from brute_force import INF, SPACES, EnumeratedEBM, random_tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rl_ebm import soft_bellman as sb
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SPACES, ids=str)
with_forbidden = pytest.mark.parametrize("forbid", [0.0, 0.3])
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def close(got, want, **tolerance):
    torch.testing.assert_close(got, want, **(FLOAT64 | tolerance))


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def log_pi_of(q):
    return [sb.log_policy(q_t) for q_t in q]


def alive(shape, seed=0, **options):
    """Random tables of ``shape`` with at least one possible response, from ``seed`` upwards."""
    while EnumeratedEBM(r := random_tables(*shape, seed=seed, **options), shape[2]).log_z == -INF:
        seed += 1000
    return r


def at_sequences(tables, space):
    """Rows (N, T, A) at the prefixes of every response, with tokens and lengths."""
    tokens, lengths = space.sequences()
    index = space.prefix_indices(tokens)
    return torch.stack([t[i] for t, i in zip(tables, index.T, strict=True)], 1), tokens, lengths


# Rows: V and pi -------------------------------------------------------------------------------


def test_soft_value_and_log_policy_are_log_sum_exp_and_log_softmax():
    q = random_tables(4, 3, seed=1, scale=3.0, forbid=0.4)[-1]
    want_v = [brute_force.log_sum_exp(row) for row in q.tolist()]
    want_log_pi = [brute_force.log_softmax(row) for row in q.tolist()]
    close(sb.soft_value(q), vector(want_v))
    close(sb.log_policy(q), vector(want_log_pi))


def test_gradient_of_the_soft_value_is_the_policy():
    q = random_tables(3, 2, seed=2, forbid=0.3)[-1].requires_grad_()
    (grad,) = torch.autograd.grad(sb.soft_value(q).sum(), q)
    close(grad, sb.log_policy(q).exp().detach())
    alive_rows = q.detach()[~torch.isneginf(q).any(1)].requires_grad_()
    assert torch.autograd.gradcheck(sb.soft_value, alive_rows)
    assert torch.autograd.gradcheck(sb.log_policy, alive_rows)


@pytest.mark.parametrize("function", [sb.soft_value, sb.log_policy])
def test_a_row_of_forbidden_actions_is_minus_infinity_with_zero_gradient(function):
    q = torch.tensor([[-INF, -INF], [0.3, -INF]], dtype=torch.float64, requires_grad=True)
    out = function(q)
    assert torch.isneginf(out[0]).all()
    assert not torch.isnan(out).any()
    (grad,) = torch.autograd.grad(out[torch.isfinite(out)].sum(), q, retain_graph=True)
    assert (grad[0] == 0).all()
    assert torch.isfinite(grad).all()
    (grad,) = torch.autograd.grad(out.sum(), q)  # also when the -inf itself is summed
    assert (grad[0] == 0).all()
    assert torch.isfinite(grad).all()


def test_extreme_float32_logits_neither_overflow_nor_underflow():
    q = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [1e4, -1e4]])
    want = torch.tensor([1e4 + math.log(2), -1e4 + math.log(2), 1e4])
    close(sb.soft_value(q), want, rtol=2e-7)
    log_pi = sb.log_policy(q)
    assert log_pi.dtype == torch.float32
    close(log_pi[:2], torch.full((2, 2), -math.log(2)), rtol=1e-3)
    close(log_pi[2], torch.tensor([0.0, -2e4]), atol=1e-6)


# M and its inverse ------------------------------------------------------------------------------


@in_all_spaces
@with_forbidden
def test_q_is_the_log_sum_over_all_completions_and_v_is_log_z(shape, forbid):
    r = alive(shape, seed=3, scale=2.0, forbid=forbid)
    truth = EnumeratedEBM(r, shape[2])
    q = sb.q_from_r(r, TokenSpace(*shape))
    close(q, truth.q_tables())
    assert sb.soft_value(q[0]).item() == pytest.approx(truth.log_z, abs=1e-12)
    close(
        sb.sequence_log_probs(log_pi_of(q), TokenSpace(*shape)),
        vector(truth.log_probs),
    )


@in_all_spaces
def test_prompts_are_leading_dimensions(shape):
    space = TokenSpace(*shape)
    r = random_tables(*shape, seed=4, leading=(2, 3), forbid=0.1)
    q = sb.q_from_r(r, space)
    log_probs = sb.sequence_log_probs(log_pi_of(q), space)
    r_back, residual = sb.r_from_q(q, space), sb.bellman_residual(q, [t + 1 for t in r], space)
    for i, j in [(0, 0), (0, 2), (1, 1)]:
        one = [t[i, j] for t in r]
        close([t[i, j] for t in q], sb.q_from_r(one, space))
        close([t[i, j] for t in r_back], sb.r_from_q(sb.q_from_r(one, space), space))
        more = [t + 1 for t in one]
        close(
            [t[i, j] for t in residual], sb.bellman_residual(sb.q_from_r(one, space), more, space)
        )
        close(log_probs[i, j], sb.sequence_log_probs(log_pi_of(sb.q_from_r(one, space)), space))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SPACES), st.integers(0, 10**6), st.floats(1e-3, 100), st.booleans())
def test_m_and_its_inverse_undo_each_other(shape, seed, scale, forbid):
    space = TokenSpace(*shape)
    tables = random_tables(*shape, seed=seed, scale=scale, forbid=0.2 * forbid)
    # Where nothing possible follows an action, q forbids it, and so does the r that comes back.
    live_q = sb.q_from_r(tables, space)
    live_r = [t.masked_fill(torch.isneginf(q), -INF) for t, q in zip(tables, live_q, strict=True)]
    tolerance = {"atol": 1e-12 * max(scale, 1.0)}
    close(sb.r_from_q(live_q, space), live_r, **tolerance)
    assume(all(torch.isfinite(sb.soft_value(t)).all() for t in tables))
    close(sb.q_from_r(sb.r_from_q(tables, space), space), tables, **tolerance)


def test_the_last_position_of_eos_mode_allows_only_eos_whatever_the_tables_say():
    space = TokenSpace(3, 3, eos_id=1)
    r = random_tables(3, 3, 1, seed=5)
    dirty = [*r[:-1], r[-1].masked_fill(torch.isneginf(r[-1]), 2.5)]
    close(sb.q_from_r(dirty, space), sb.q_from_r(r, space))
    close(sb.r_from_q(dirty, space), sb.r_from_q(r, space))
    close(sb.bellman_residual(r, dirty, space), sb.bellman_residual(r, r, space))


@in_all_spaces
def test_gauge_a_constant_for_each_state_is_potential_shaping(shape):
    space = TokenSpace(*shape)
    q = random_tables(*shape, seed=6)
    shift = [t[..., 0] for t in random_tables(*shape[:2], shape[2], seed=7, scale=3.0)]
    shift = [torch.nan_to_num(c, neginf=1.7) for c in shift]
    shifted = [q_t + c[:, None] for q_t, c in zip(q, shift, strict=True)]
    r, r_shifted = sb.r_from_q(q, space), sb.r_from_q(shifted, space)
    after = [space.spread(c, fill=0.0) for c in shift[1:]] + [torch.zeros(())]
    for t in range(space.max_length):
        close(r_shifted[t], r[t] + shift[t][:, None] - after[t])
    close(*(sb.sequence_log_probs(log_pi_of(x), space) for x in (q, shifted)))
    # All log-weights move by the constant of the root, and so does log Z.
    weights = [EnumeratedEBM(x, shape[2]) for x in (r, r_shifted)]
    root = shift[0].item()
    close(*(vector(w.log_weights) + c for w, c in zip(weights, (root, 0.0), strict=True)))


@in_all_spaces
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_m_is_lipschitz_in_the_depth_to_go_and_its_inverse_by_two(shape, size):
    space = TokenSpace(*shape)
    x = random_tables(*shape, seed=8)
    noise = random_tables(*shape, seed=9)
    y = [a + size * torch.tanh(b) for a, b in zip(x, noise, strict=True)]
    for t, (a, b) in enumerate(zip(sb.q_from_r(x, space), sb.q_from_r(y, space), strict=True)):
        assert distance(a, b) <= (space.max_length - t) * size * (1 + 1e-12)
    for a, b in zip(sb.r_from_q(x, space), sb.r_from_q(y, space), strict=True):
        assert distance(a, b) <= 2 * size * (1 + 1e-12)


def distance(a, b):
    return (a - b).masked_fill(torch.isneginf(a), 0.0).abs().max()


def test_the_lipschitz_constants_are_attained():
    space, r = TokenSpace(2, 4), random_tables(2, 4, seed=9)
    q, shifted = sb.q_from_r(r, space), sb.q_from_r([t + 0.7 for t in r], space)
    close(shifted, [t + 0.7 * (4 - depth) for depth, t in enumerate(q)])
    signs = [t + 0.7 * (-1) ** depth for depth, t in enumerate(q)]
    assert distance(sb.r_from_q(signs, space)[0], r[0]).item() == pytest.approx(1.4)


# Along sequences ------------------------------------------------------------------------------


@in_all_spaces
def test_r_along_a_path_is_that_of_the_tables_and_sums_to_the_log_weight(shape):
    space = TokenSpace(*shape)
    q = random_tables(*shape, seed=10, scale=2.0)
    rows, tokens, lengths = at_sequences(q, space)
    r = sb.r_along_path(rows, tokens, lengths)
    truth = EnumeratedEBM(sb.r_from_q(q, space), shape[2])
    for i, y in enumerate(truth.sequences):
        want = [truth.r[y[:t]][y[t]] for t in range(len(y))]
        close(r[i].tolist(), want + [0.0] * (space.max_length - len(y)))
    # The log-weight that the policy gives a response, V(x) included.
    log_p = brute_force.sequence_log_probs(log_pi_of(q), shape[2])
    close(r.sum(1), log_p + brute_force.log_sum_exp(q[0][0].tolist()))


def test_r_along_a_path_reads_nothing_past_the_end():
    space = TokenSpace(3, 4, eos_id=1)
    rows, tokens, lengths = at_sequences(random_tables(3, 4, 1, seed=11), space)
    rows.requires_grad_()
    past = torch.arange(4) >= lengths[:, None]
    want = sb.r_along_path(rows, tokens, lengths)
    (want_grad,) = torch.autograd.grad(want.sum(), rows)
    for junk in (-INF, 1e9):
        dirty = rows.detach().masked_fill(past[..., None], junk).requires_grad_()
        got = sb.r_along_path(dirty, tokens.masked_fill(past, 2), lengths)
        (grad,) = torch.autograd.grad(got.sum(), dirty)
        close(got, want)
        close(grad, want_grad)


def test_r_along_a_path_is_minus_infinity_at_a_forbidden_token_and_never_nan():
    q = torch.tensor([[[0.2, -INF], [-INF, -INF]]], dtype=torch.float64, requires_grad=True)
    r = sb.r_along_path(q, torch.tensor([[1, 0]]), torch.tensor([2]))
    assert r.tolist() == [[-INF, -INF]]
    (grad,) = torch.autograd.grad(r.sum(), q)
    assert torch.isfinite(grad).all()
    with pytest.raises(ValueError, match="no r gives such a q; put -inf there"):
        sb.r_along_path(q, torch.tensor([[0, 0]]), torch.tensor([2]))


@in_all_spaces
def test_sequence_log_prob_is_the_sum_over_real_tokens(shape):
    space = TokenSpace(*shape)
    log_pi = log_pi_of(random_tables(*shape, seed=12))
    rows, tokens, lengths = at_sequences(log_pi, space)
    past = torch.arange(space.max_length) >= lengths[:, None]
    for junk in (0.0, 3.0, -INF):
        dirty = rows.masked_fill(past[..., None], junk)
        got = sb.sequence_log_prob(dirty, tokens.masked_fill(past, 1), lengths)
        close(got, brute_force.sequence_log_probs(log_pi, shape[2]))


# Bellman residual, marginals, sums --------------------------------------------------------------


@in_all_spaces
@with_forbidden
def test_the_bellman_residual_is_what_r_lacks_for_q_to_be_its_solution(shape, forbid):
    space = TokenSpace(*shape)
    r = alive(shape, seed=13, forbid=forbid)
    noise = random_tables(*shape, seed=14)
    q = [a + b.clamp(min=-9.0) for a, b in zip(sb.q_from_r(r, space), noise, strict=True)]
    b = sb.bellman_residual(q, r, space)
    assert not any(torch.isnan(t).any() for t in b)
    assert max(t.nan_to_num(neginf=0.0).abs().max() for t in b) > 0.1
    assert all((x[torch.isneginf(y)] == 0).all() for x, y in zip(b, r, strict=True))
    close(sb.q_from_r([x + y for x, y in zip(r, b, strict=True)], space), q)


@in_all_spaces
@with_forbidden
def test_the_bellman_residual_vanishes_at_the_solution(shape, forbid):
    space = TokenSpace(*shape)
    r = alive(shape, seed=15, forbid=forbid)
    b = sb.bellman_residual(sb.q_from_r(r, space), r, space)
    close(b, [torch.zeros_like(t) for t in r])


def test_the_bellman_residual_is_infinite_where_q_forbids_what_r_allows():
    space, r = TokenSpace(2, 2), random_tables(2, 2, seed=16)
    q = sb.q_from_r(r, space)
    q[1][1, 0] = -INF
    assert torch.isinf(sb.bellman_residual(q, r, space)[1][1, 0])


@in_all_spaces
@with_forbidden
def test_prefix_probabilities_by_forward_pass_enumeration_and_gradient_agree(shape, forbid):
    """App. A.11: dV(x)/dr(s, a) is the probability of the prefix s a."""
    space = TokenSpace(*shape)
    r = [t.requires_grad_() for t in alive(shape, seed=17, forbid=forbid)]
    truth = EnumeratedEBM([t.detach() for t in r], shape[2])
    q = sb.q_from_r(r, space)
    grads = torch.autograd.grad(sb.soft_value(q[0])[0], r)
    log_pi = [t.detach() for t in log_pi_of(q)]
    marginals = sb.forward_log_marginals(log_pi, space)
    for t, states in enumerate(truth.states):
        close(marginals[t], vector([truth.prefix_log_prob(s) for s in states]))
        actions = range(space.vocab_size)
        want = [[math.exp(truth.prefix_log_prob((*s, a))) for a in actions] for s in states]
        close(grads[t], vector(want))
        close((marginals[t][:, None] + log_pi[t]).exp(), vector(want))


@in_all_spaces
def test_log_probs_of_all_responses_sum_to_one_whatever_the_logits(shape):
    """Prop. 4: where EOS is forced at the last depth, nothing is lost."""
    space = TokenSpace(*shape)
    log_pi = log_pi_of(random_tables(*shape, seed=18, scale=5.0, leading=(4,)))
    log_probs = sb.sequence_log_probs(log_pi, space)
    close(log_probs, brute_force.sequence_log_probs(log_pi, shape[2]))
    close(log_probs.exp().sum(-1), torch.ones(4).double())


def test_expectation_counts_impossible_events_as_nothing():
    log_p = torch.tensor([-INF, -INF, math.log(0.5), math.log(0.25)], requires_grad=True)
    x = torch.tensor([INF, -INF, 4.0, -2.0], requires_grad=True)
    out = sb.expectation(log_p, x)
    close(out, torch.tensor([0.0, 0.0, 2.0, -0.5]), rtol=1e-6)
    for grad in torch.autograd.grad(out.sum(), [log_p, x]):
        assert torch.isfinite(grad).all()
        assert grad[:2].tolist() == [0.0, 0.0]
    assert sb.expectation(torch.tensor([0.0]), torch.tensor([INF])).item() == INF


def test_expectation_of_infinity_is_infinite_however_small_its_probability():
    # exp(-1e4) is 0 in floating point, and 0 * inf is nan.
    got = sb.expectation(torch.tensor([-1e4, -1e4]), torch.tensor([INF, -INF]))
    assert got.tolist() == [INF, -INF]


# Checks -----------------------------------------------------------------------------------------


def test_r_from_q_refuses_a_finite_q_before_a_dead_end():
    q = [torch.zeros(1, 2), torch.tensor([[0.1, 0.2], [-INF, -INF]])]
    with pytest.raises(ValueError, match="every action is forbidden: no r gives such a q"):
        sb.r_from_q(q, TokenSpace(2, 2))
    q[0][0, 1] = -INF
    assert sb.r_from_q(q, TokenSpace(2, 2))[0][0, 1] == -INF


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (sb.q_from_r, "r"),
        (sb.r_from_q, "q"),
        (sb.bellman_residual, "qr"),
        (sb.forward_log_marginals, ["log_pi"]),
    ],
)
def test_tables_of_another_space_are_refused_by_name(function, names):
    good, space = random_tables(3, 3, seed=25), TokenSpace(3, 3)
    for i, name in enumerate(names):
        for bad, message in [
            (good[:2], rf"{name} has 2 tables, expected one for each of the 3 depths"),
            (
                [*good[:2], good[2][:4]],
                rf"{name}\[2\] has shape \(4, 3\), expected \(\.\.\., 9, 3\)",
            ),
            ([good[0], good[1][:, :2], good[2]], rf"{name}\[1\] has shape \(3, 2\)"),
        ]:
            arguments = [good] * i + [bad] + [good] * (len(names) - i - 1)
            with pytest.raises(ValueError, match=message):
                function(*arguments, space)
