"""Divergences and entropies against enumeration, their bounds, and estimates of the KL."""

from __future__ import annotations

import math

import brute_force
import mpmath
import pytest
import torch
from brute_force import INF, SPACES, random_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_policies import close

from rl_ebm import divergences as dv
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SPACES, ids=str)
PAIRWISE = {dv.kl: brute_force.kl, dv.tv: brute_force.tv, dv.js: brute_force.js}
each_divergence = pytest.mark.parametrize("divergence", list(PAIRWISE), ids=lambda f: f.__name__)


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def random_policy(shape, seed, **options):
    return [log_policy(q) for q in random_tables(*shape, seed=seed, **options)]


def log_rows(n, size, seed, forbid=0.0):
    q = random_tables(size, 1, seed=seed, scale=2.0, forbid=forbid, leading=(n,))[0][:, 0]
    return log_policy(q[~torch.isneginf(q).all(-1)])


def responses(log_pi, shape):
    """(..., N), token by token."""
    return brute_force.sequence_log_probs(log_pi, shape[2])


# Rows -----------------------------------------------------------------------------------------


@each_divergence
@pytest.mark.parametrize("forbid", [0.0, 0.3])
def test_rows_agree_with_their_definition(divergence, forbid):
    log_p, log_q = log_rows(50, 5, seed=1, forbid=forbid), log_rows(50, 5, seed=2, forbid=forbid)
    n = min(len(log_p), len(log_q))
    got = divergence(log_p[:n], log_q[:n])
    want = [
        PAIRWISE[divergence](p, q)
        for p, q in zip(log_p[:n].tolist(), log_q[:n].tolist(), strict=True)
    ]
    close(got, vector(want))
    assert torch.isinf(got).any() == (forbid > 0 and divergence is dv.kl)


def test_entropy_of_rows_agrees_with_its_definition_and_is_largest_for_the_uniform():
    log_p = log_rows(50, 5, seed=3, forbid=0.3)
    close(dv.entropy(log_p), vector([brute_force.entropy(p) for p in log_p.tolist()]))
    assert (dv.entropy(log_p) <= math.log(5) + 1e-12).all()
    close(dv.entropy(torch.full((5,), -math.log(5)).double()).item(), math.log(5), 1e-6)
    close(dv.entropy(vector([0.0, -INF])), vector(0.0))  # 0 log 0 = 0


@each_divergence
def test_a_distribution_is_at_distance_zero_from_itself_and_from_nothing_else(divergence):
    log_p = log_rows(50, 4, seed=4, forbid=0.3)
    close(divergence(log_p, log_p), torch.zeros(len(log_p)).double())
    assert (divergence(log_p, log_rows(50, 4, seed=5)[: len(log_p)]) > 0).all()


def test_disjoint_distributions_are_as_far_apart_as_can_be():
    log_p, log_q = vector([0.0, -INF, -INF]), vector([-INF, -math.log(2), -math.log(2)])
    assert dv.kl(log_p, log_q) == dv.kl(log_q, log_p) == INF
    close(dv.tv(log_p, log_q), vector(1.0))
    close(dv.js(log_p, log_q), vector(math.log(2)))


def test_kl_is_infinite_where_q_forbids_however_small_p_is():
    # exp(-1e4) is 0 in floating point, and 0 * inf is nan.
    assert dv.kl(vector([0.0, -1e4]), vector([0.0, -INF])) == INF


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(1e-3, 30.0))
def test_symmetry_limits_and_pinsker(seed, scale):
    q = random_tables(5, 1, seed=seed, scale=scale, forbid=0.2, leading=(2, 40))[0][..., 0, :]
    q[..., 0] = q[..., 0].nan_to_num(neginf=0.0)  # one action at least
    log_p, log_q = log_policy(q)
    tv, js, kl = dv.tv(log_p, log_q), dv.js(log_p, log_q), dv.kl(log_p, log_q)
    close(tv, dv.tv(log_q, log_p))
    close(js, dv.js(log_q, log_p))
    assert ((tv >= 0) & (tv <= 1 + 1e-12)).all()
    assert ((js >= -1e-12) & (js <= math.log(2) + 1e-12)).all()
    assert (kl >= -1e-12).all()
    assert (tv <= (kl / 2).clamp(min=0).sqrt() + 1e-7).all()  # Pinsker
    assert (js <= tv * math.log(2) + 1e-12).all()


@each_divergence
def test_gradients_of_rows_are_those_of_the_definition_and_finite_at_forbidden_places(divergence):
    logits = [
        vector([[0.3, -INF, 1.2, -0.4], [0.1, 0.2, -INF, -INF]]).requires_grad_(),
        vector([[0.9, -INF, -0.2, 0.5], [0.7, -0.3, -INF, -INF]]).requires_grad_(),
    ]
    out = divergence(*(log_policy(q) for q in logits)).sum()
    for q, grad in zip(logits, torch.autograd.grad(out, logits), strict=True):
        assert torch.isfinite(grad).all()
        assert (grad[torch.isneginf(q)] == 0).all()
    # The same without the forbidden places.
    for row, keep in [(0, [0, 2, 3]), (1, [0, 1])]:
        free = [q[row, keep].detach().requires_grad_() for q in logits]
        assert torch.autograd.gradcheck(lambda p, q: divergence(log_policy(p), log_policy(q)), free)
        want = torch.autograd.grad(divergence(*(log_policy(q) for q in free)), free)
        both = torch.autograd.grad(divergence(*(log_policy(q) for q in logits)).sum(), logits)
        close([grad[row, keep] for grad in both], list(want))


@each_divergence
def test_gradients_reach_log_probabilities_themselves_without_nan(divergence):
    log_p = vector([-math.log(2), -math.log(2), -INF, -INF]).requires_grad_()
    log_q = vector([-math.log(4), math.log(0.5), math.log(0.25), -INF]).requires_grad_()
    for grad in torch.autograd.grad(divergence(log_p, log_q), [log_p, log_q]):
        assert torch.isfinite(grad).all()


# Tables ---------------------------------------------------------------------------------------


@in_all_spaces
@pytest.mark.parametrize("forbid", [0.0, 0.15])
def test_kl_of_tables_agrees_with_enumeration(shape, forbid):
    keep = random_tables(*shape, seed=6, forbid=forbid)
    for t in keep:  # a policy has an action everywhere
        column = 0 if shape[2] is None else shape[2]
        t[..., column] = t[..., column].nan_to_num(neginf=0.4)
    log_p = [log_policy(q) for q in keep]
    log_q = random_policy(shape, seed=7)
    p, q = (responses(x, shape).tolist() for x in (log_p, log_q))
    close(dv.kl_tables(log_p, log_q, TokenSpace(*shape)), vector(brute_force.kl(p, q)))
    close(dv.kl_tables(log_q, log_p, TokenSpace(*shape)), vector(brute_force.kl(q, p)))


@in_all_spaces
def test_entropy_of_tables_agrees_with_enumeration(shape):
    log_p = random_policy(shape, seed=8)
    got = dv.entropy_tables(log_p, TokenSpace(*shape))
    close(got, vector(brute_force.entropy(responses(log_p, shape).tolist())))


@in_all_spaces
def test_kl_by_depth_is_what_each_decision_adds(shape):
    """Entry t is KL of the first t + 1 tokens, less that of the first t; also by App. A.4."""
    space, log_p, log_q = TokenSpace(*shape), random_policy(shape, 9), random_policy(shape, 10)
    got = dv.kl_by_depth(log_p, log_q, space)
    assert got.shape == (space.max_length,)

    names = brute_force.sequences(*shape)
    both = [responses(x, shape).tolist() for x in (log_p, log_q)]

    def kl_of_prefixes(depth):
        grouped = []
        for log_probs in both:
            groups = {}
            for y, lp in zip(names, log_probs, strict=True):
                groups.setdefault(y[:depth], []).append(lp)
            grouped.append([brute_force.log_sum_exp(group) for group in groups.values()])
        return brute_force.kl(*grouped)

    want = [kl_of_prefixes(t + 1) - kl_of_prefixes(t) for t in range(space.max_length)]
    close(got, vector(want))
    close(got.sum(), dv.kl_tables(log_p, log_q, space))


def test_tables_take_prompts_as_leading_dimensions():
    shape = (3, 3, 1)
    log_p, log_q = (random_policy(shape, seed, leading=(2, 3)) for seed in (11, 12))
    space = TokenSpace(*shape)
    assert dv.kl_by_depth(log_p, log_q, space).shape == (3, 2, 3)
    got = dv.kl_tables(log_p, log_q, space)
    close(got[1, 2], dv.kl_tables([t[1, 2] for t in log_p], [t[1, 2] for t in log_q], space))
    assert got.shape == (2, 3)
    close(dv.entropy_tables(log_p, space)[1, 2], dv.entropy_tables([t[1, 2] for t in log_p], space))


def test_states_out_of_reach_count_for_nothing():
    """Below an action that P never takes, Q may do as it likes, and P may be forbidden."""
    space = TokenSpace(2, 2)
    log_p = [vector([[0.0, -INF]]), vector([[math.log(0.5)] * 2, [-INF, -INF]])]
    log_q = [vector([[math.log(0.5)] * 2]), vector([[math.log(0.5)] * 2, [0.0, -INF]])]
    close(dv.kl_tables(log_p, log_q, space), vector(math.log(2)))
    close(dv.entropy_tables(log_p, space), vector(math.log(2)))
    assert dv.kl_tables(log_q, log_p, space) == INF


def test_kl_of_tables_is_infinite_however_rare_the_state_at_which_q_forbids():
    log_p = [vector([[0.0, -1e4]]), vector([[math.log(0.5)] * 2] * 2)]
    log_q = [log_p[0], vector([[math.log(0.5)] * 2, [0.0, -INF]])]
    assert dv.kl_tables(log_p, log_q, TokenSpace(2, 2)) == INF


def test_gradients_of_tables_are_finite_where_responses_are_impossible():
    space = TokenSpace(2, 2)
    q = [vector([[0.3, 0.1]]), vector([[0.2, -INF], [0.5, 0.4]])]
    other = [vector([[-0.3, 0.8]]), vector([[-0.2, -INF], [0.7, 0.1]])]
    for t in (*q, *other):
        t.requires_grad_()
    out = dv.kl_tables([log_policy(t) for t in q], [log_policy(t) for t in other], space)
    grads = torch.autograd.grad(out, [*q, *other], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in grads)
    assert max(g.abs().max() for g in grads if g is not None) > 0


@in_all_spaces
@pytest.mark.parametrize("name", ["kl", "entropy"])
def test_gradients_of_tables_are_those_of_enumeration(shape, name):
    """Also through the probability of reaching a state."""
    space = TokenSpace(*shape)
    q = [t.requires_grad_() for t in random_tables(*shape, seed=17)]
    other = random_policy(shape, seed=18)
    log_pi = [log_policy(t) for t in q]
    rows = [responses(x, shape) for x in (log_pi, other)]
    if name == "entropy":
        got, want = dv.entropy_tables(log_pi, space), dv.entropy(rows[0])
    else:
        got = getattr(dv, f"{name}_tables")(log_pi, other, space)
        want = getattr(dv, name)(*rows)
    close(list(torch.autograd.grad(got, q, retain_graph=True)), list(torch.autograd.grad(want, q)))


# Estimates --------------------------------------------------------------------------------------

TERMS = {
    "k1": lambda log_rho: -log_rho,
    "k2": lambda log_rho: log_rho**2 / 2,
    "k3": lambda log_rho: math.exp(log_rho) - 1 - log_rho,
}


def mean_of(kind, log_p, log_q):
    """Mean of the estimate over the samples of P."""
    terms = dv.KL_TERMS[kind](vector(log_p) - vector(log_q)).tolist()
    pairs = zip(log_p, terms, strict=True)
    return math.fsum(math.exp(a) * term for a, term in pairs if a > -INF)


@pytest.mark.parametrize("kind", TERMS)
def test_estimates_by_their_definition(kind):
    for log_rho in (3.0, -3.0, 0.1, -0.1):
        got = float(dv.KL_TERMS[kind](vector(-log_rho)))
        assert got == pytest.approx(TERMS[kind](log_rho), rel=1e-12)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    log_p, log_q = log_rows(2, 6, seed=13).tolist()
    truth = brute_force.kl(log_p, log_q)
    assert mean_of("k1", log_p, log_q) == pytest.approx(truth, rel=1e-12)
    assert mean_of("k3", log_p, log_q) == pytest.approx(truth, rel=1e-12)
    assert abs(mean_of("k2", log_p, log_q) - truth) > 0.05 * truth
    # Near P = Q the bias of k2 is of third order.
    near = [log_policy(vector(log_p) + e * vector(log_q)).tolist() for e in (1e-2, 1e-3)]
    bias = [abs(mean_of("k2", log_p, q) / brute_force.kl(log_p, q) - 1) for q in near]
    assert bias[1] < 0.15 * bias[0] < 0.15


def test_k3_is_too_small_by_the_mass_of_q_where_p_has_none():
    log_p = [math.log(0.25), math.log(0.75), -INF]
    log_q = [math.log(0.3), math.log(0.5), math.log(0.2)]
    truth = brute_force.kl(log_p, log_q)
    assert mean_of("k1", log_p, log_q) == pytest.approx(truth, rel=1e-12)
    assert mean_of("k3", log_p, log_q) == pytest.approx(truth - 0.2, rel=1e-12)


def test_k3_is_never_negative_and_keeps_its_digits_near_equality():
    for log_rho in (3.0, -3.0, 1e-3, -1e-3, 1e-9, -1e-9):
        got = float(dv.KL_TERMS["k3"](vector(-log_rho)))
        with mpmath.workdps(50):
            want = mpmath.expm1(log_rho) - mpmath.mpf(log_rho)
        assert got > 0
        assert got == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("kind", TERMS)
def test_a_sample_that_q_forbids_gives_infinity(kind):
    assert float(dv.KL_TERMS[kind](vector(INF))) == INF
