"""Solutions by automata against listing every response, on random machines of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from automaton_cases import lse, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_ebm
from rl_ebm.automata import deterministic
from rl_ebm.exact.automaton.values import find_edges

CASES = range(300)


def solved(seed, zeros=0.2):
    ebm, truth = random_case(seed, zeros)
    possible = [p for p in range(ebm.num_prompts) if truth.log_z(p) > -math.inf]
    if len(possible) < ebm.num_prompts:
        with pytest.raises(ValueError, match="impossible"):
            rl_ebm.solve(ebm)
        return None
    solution = rl_ebm.solve(ebm)
    assert solution.mode == "exact-automaton"
    return ebm, solution, truth


@pytest.mark.parametrize("seed", CASES)
def test_everything_agrees_with_enumeration(seed):
    check_everything(seed)


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.4])
@given(seed=st.integers(1000, 2**40))
@settings(max_examples=250, deadline=None)
def test_a_thousand_random_automata_agree_with_enumeration(zeros, seed):
    check_everything(seed, zeros)


def check_everything(seed, zeros=0.2):
    """log Z, log-probabilities and q* of a random EBM."""
    found = solved(seed, zeros)
    if found is None:
        return
    ebm, solution, truth = found
    for p in range(ebm.num_prompts):
        log_z = truth.log_z(p)
        assert float(solution.log_z[p]) == pytest.approx(log_z, rel=1e-10, abs=1e-10)
        ids = torch.full_like(truth.lengths, p)
        got = solution.log_prob(truth.tokens, truth.lengths, ids).tolist()
        weights = ebm.log_weight(truth.tokens, truth.lengths, ids).tolist()
        for x, weight, want in zip(got, weights, truth.log_weight[p], strict=True):
            assert x == pytest.approx(want - log_z, rel=1e-10, abs=1e-10)
            assert weight == pytest.approx(want, rel=1e-10, abs=1e-10)
        check_q(ebm, solution, truth, p)


def check_q(ebm, solution, truth, p):
    """q*(s, a): the weight of all that begins so, less log p_ref of the prefix."""
    space = ebm.space
    ids = torch.full_like(truth.lengths, p)
    tokens = truth.tokens
    q = solution.logits(tokens, ids)
    log_ref = ebm.log_ref_rows(tokens, ids)
    below: dict[tuple, list[float]] = {}
    for y, n, weight in zip(
        tokens.tolist(), truth.lengths.tolist(), truth.log_weight[p], strict=True
    ):
        for t in range(1, n + 1):
            below.setdefault(tuple(y[:t]), []).append(weight)
    for i, (y, n) in enumerate(zip(tokens.tolist(), truth.lengths.tolist(), strict=True)):
        prefix = 0.0
        for t in range(n):
            for a in range(space.vocab_size):
                want = lse(below.get((*y[:t], a), []))
                if prefix > -math.inf:
                    want -= prefix
                assert float(q[i, t, a]) == pytest.approx(want, rel=1e-10, abs=1e-9)
            prefix += float(log_ref[i, t, y[t]])


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_a_depth_are_those_of_sequences(seed):
    found = solved(seed)
    if found is None:
        return
    ebm, solution, truth = found
    space = ebm.space
    for p in range(ebm.num_prompts):
        ids = torch.full_like(truth.lengths, p)
        q = solution.logits(truth.tokens, ids)
        log_ref = ebm.log_ref_rows(truth.tokens, ids)
        index = space.prefix_indices(truth.tokens)
        reward = ebm.reward(truth.tokens, truth.lengths, ids)
        for t in range(space.max_length):
            here = truth.lengths > t
            got = solution.q_rows(t, index[:, t], p)[here]
            torch.testing.assert_close(got, q[here, t], rtol=1e-12, atol=1e-12)
            everything = solution.q_rows(t, slice(0, space.num_prefixes(t)), p)
            torch.testing.assert_close(everything[index[here, t]], got, rtol=1e-12, atol=1e-12)
            ends = truth.lengths == t + 1
            last = truth.tokens[ends, t][:, None]
            paid = solution.reward_rows(t, index[:, t], p)[ends].gather(1, last)[:, 0]
            torch.testing.assert_close(paid, reward[ends], rtol=1e-12, atol=1e-12)
            r = solution.r_rows(t, index[:, t], p)
            want = log_ref[ends, t].gather(1, last)[:, 0] + reward[ends] / ebm.beta
            # After a prefix that p_ref never gives, either is right: nothing counts there.
            known = torch.isfinite(want)
            got_r = r[ends].gather(1, last)[:, 0]
            torch.testing.assert_close(got_r[known], want[known], rtol=1e-10, atol=1e-10)
            going_on = truth.lengths > t + 1
            step = truth.tokens[going_on, t][:, None]
            got_r = r[going_on].gather(1, step)[:, 0]
            want = log_ref[going_on, t].gather(1, step)[:, 0].double()
            known = torch.isfinite(want)
            torch.testing.assert_close(got_r[known], want[known], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(24))
def test_samples_have_the_right_frequencies(seed):
    found = solved(seed)
    if found is None:
        return
    ebm, solution, truth = found
    n = 20_000
    for p in range(ebm.num_prompts):
        ids = torch.full((n,), p)
        batch = solution.sample(n, torch.Generator().manual_seed(seed), ids)
        assert torch.equal(ebm.space.check(batch.tokens, batch.lengths), batch.lengths)
        counts = ebm.space.sequence_indices(batch.tokens, batch.lengths)
        counts = counts.bincount(minlength=len(truth.lengths)).tolist()
        log_z = truth.log_z(p)
        chi2, cells = 0.0, 0
        for count, weight in zip(counts, truth.log_weight[p], strict=True):
            expected = n * math.exp(weight - log_z)
            if expected == 0:
                assert count == 0
            elif expected >= 5:
                chi2 += (count - expected) ** 2 / expected
                cells += 1
        # Mean cells, variance 2 cells: six standard deviations above.
        assert chi2 < cells + 6 * math.sqrt(2 * max(cells, 1)) + 6


def test_the_sampler_draws_the_same_from_the_same_seed():
    found = (solved(seed) for seed in range(100))
    _, solution, _ = next(x for x in found if x and x[0].space.max_length == 4)
    ids = torch.zeros(50, dtype=torch.int64)
    draws = [
        solution.sample(50, torch.Generator().manual_seed(s), ids).tokens.tolist()
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("eos", [None, 0])
def test_edges_of_more_states_than_a_square_table_has_room_for(eos):
    k, a = 2**13 + 8, 3
    g = torch.Generator().manual_seed(0)
    next_ = torch.randint(k, (k, a), generator=g)
    weight = torch.randn(k, a, generator=g, dtype=torch.float64)
    edges = find_edges(deterministic(next_, weight), eos)
    sums: dict[tuple[int, int], list[float]] = {}
    for i, (row, weights) in enumerate(zip(next_.tolist(), weight.tolist(), strict=True)):
        for token, (j, x) in enumerate(zip(row, weights, strict=True)):
            if token != eos:
                sums.setdefault((i, j), []).append(x)
    pairs = list(zip(edges.source.tolist(), edges.target.tolist(), strict=True))
    assert pairs == sorted(sums)
    want = torch.tensor([lse(sums[pair]) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(edges.log_weight[0], want)
    tokens = [token for token in range(a) if token != eos]
    assert torch.equal(edges.target[edges.of_token[:, tokens]], next_[:, tokens])
    assert torch.equal(edges.source[edges.of_token[:, 1]], torch.arange(k))
