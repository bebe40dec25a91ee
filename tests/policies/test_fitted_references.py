"""n-grams and hidden Markov models fitted to responses, against counting and summing by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

import rl_ebm
from rl_ebm.automata import hidden
from rl_ebm.policies import AutomatonPolicy, fit_hmm, fit_ngram, log_prob
from rl_ebm.policies.hmm import expected_counts
from rl_ebm.tokens import Batch

SPACE = rl_ebm.TokenSpace(3, 5, eos_id=0)
PROMPTS = [[1, 2], [], [2]]


def corpus(space, n=60, prompts=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    policy = rl_ebm.policies.Tabular(space, None, 1.5, g)
    ids = torch.randint(prompts, (n,), generator=g)
    batch = rl_ebm.policies.sample(policy, space, n, g)
    # What stands past the end is never read.
    tokens = torch.where(batch.mask, batch.tokens, 2)
    return Batch(tokens, batch.lengths, ids)


def by_hand(batch, order, smoothing, prompts, a):
    """p(token | history) from counts in dictionaries; None stands in front of every text."""
    counts = Counter()
    for row, n, p in zip(
        batch.tokens.tolist(), batch.lengths.tolist(), batch.prompt_ids.tolist(), strict=True
    ):
        text = [None, *(prompts[p] if prompts else []), *row[:n]]
        for i in range(len(text) - n, len(text)):
            for k in range(min(order - 1, i) + 1):
                counts[tuple(text[i - k : i]), text[i]] += 1

    def p(history, token):
        below = 1 / a if not history else p(history[1:], token)
        if len(history) > order - 1:
            return below
        seen = sum(counts[history, other] for other in range(a))
        if seen + smoothing == 0:
            return below
        return (counts[history, token] + smoothing * a * below) / (seen + smoothing * a)

    return p


@pytest.mark.parametrize("space", [SPACE, rl_ebm.TokenSpace(3, 4)], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", [0, 0.5])
@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_ngrams_are_counts(space, order, smoothing, prompts):
    batch = corpus(space, prompts=3 if prompts else 1)
    policy = fit_ngram(space, batch, order, smoothing, prompts)
    p = by_hand(batch, order, smoothing, prompts, space.vocab_size)
    tokens, lengths = space.sequences()
    for prompt in range(3 if prompts else 1):
        ids = torch.full_like(lengths, prompt)
        rows = policy.logits(tokens, ids).exp()
        for i, (y, n) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            impossible = False
            for t in range(n):
                text = [None, *(prompts[prompt] if prompts else []), *y[:t]]
                history = tuple(text[max(0, len(text) - order + 1) :])
                for a in range(space.vocab_size):
                    want = 0.0 if impossible else p(history, a)
                    assert float(rows[i, t, a]) == pytest.approx(want, abs=1e-12)
                impossible = impossible or p(history, y[t]) == 0


def test_an_ngram_reference_is_solved_as_an_automaton_as_on_a_tree():
    batch = corpus(SPACE, prompts=3)
    policy = fit_ngram(SPACE, batch, 3, 0.3, PROMPTS)
    reward = rl_ebm.rewards.Automaton.contains(SPACE, [1, 2], 2.0)
    ebm = rl_ebm.EBM(SPACE, reward, 0.7, policy, PROMPTS)
    slow = rl_ebm.EBM(
        SPACE, lambda y, n, _: reward(y, n, torch.zeros_like(n)), 0.7, policy, PROMPTS
    )
    fast, tree = rl_ebm.solve(ebm), rl_ebm.solve(slow)
    assert (fast.mode, tree.mode) == ("exact-automaton", "exact-tree")
    torch.testing.assert_close(fast.log_z, tree.log_z, rtol=1e-12, atol=1e-12)
    report = rl_ebm.verify(fast, tree)
    assert report.kl_target_policy < 1e-12
    assert report.bellman_residual_max < 1e-9


def random_law(h, a, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=g, dtype=torch.float64).log_softmax(-1)
        for shape in ((h,), (h, h), (h, a))
    )


@pytest.mark.parametrize("space", [SPACE, rl_ebm.TokenSpace(3, 4)], ids=str)
def test_expected_counts_are_sums_over_paths(space):
    law = random_law(2, 3)
    initial, transition, emission = (x.exp().tolist() for x in law)
    batch = corpus(space, n=5)
    want = [torch.zeros_like(x) for x in law]
    log_likelihood = 0.0
    for y, n in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
        paths = {}
        for z in itertools.product(range(2), repeat=n):
            p = initial[z[0]] * math.prod(emission[s][a] for s, a in zip(z, y, strict=False))
            paths[z] = p * math.prod(transition[s][r] for s, r in itertools.pairwise(z))
        total = sum(paths.values())
        log_likelihood += math.log(total) / len(batch)
        for z, p in paths.items():
            want[0][z[0]] += p / total
            for s, r in itertools.pairwise(z):
                want[1][s, r] += p / total
            for s, a in zip(z, y, strict=False):
                want[2][s, a] += p / total
    counts, got = expected_counts(law, batch)
    assert got == pytest.approx(log_likelihood, rel=1e-12)
    for mine, theirs in zip(counts, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_em_never_lowers_the_likelihood_and_finds_a_law():
    space = rl_ebm.TokenSpace(4, 12)
    sharp = [3 * x for x in random_law(2, 4, seed=3)]
    truth = AutomatonPolicy(space, hidden(*(x.log_softmax(-1) for x in sharp)))
    g = torch.Generator().manual_seed(0)
    batch = rl_ebm.policies.sample(truth, space, 400, g)
    policy, likelihood = fit_hmm(space, batch, 2, 40, 0, torch.Generator().manual_seed(1))
    assert len(likelihood) == 41
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(likelihood))
    own = log_prob(policy, space, batch.tokens, batch.lengths).mean()
    assert float(own) == pytest.approx(likelihood[-1], rel=1e-9)
    # It fits what it saw at least as well as the law that it is from.
    assert likelihood[-1] > float(log_prob(truth, space, batch.tokens, batch.lengths).mean()) - 0.05
    smooth, _ = fit_hmm(space, batch, 3, 2, 10.0, torch.Generator().manual_seed(1))
    assert not smooth.forbids


def test_log_probs_of_tokens_are_those_of_their_rows():
    policy = AutomatonPolicy(SPACE, hidden(*random_law(3, 3)))
    batch = corpus(SPACE, n=20)
    rows = policy.logits(batch.tokens).gather(2, batch.tokens[..., None])[..., 0]
    torch.testing.assert_close(policy.log_probs(batch.tokens), rows, rtol=1e-10, atol=1e-12)
    ebm = rl_ebm.EBM(SPACE, torch.zeros(SPACE.num_sequences), reference=policy)
    got = ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids)
    full = ebm.log_ref_rows(batch.tokens, batch.prompt_ids)
    want = full.gather(2, batch.tokens[..., None])[..., 0].masked_fill(~batch.mask, 0.0)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: fit_ngram(SPACE, b, 0), "order"),
        (lambda b: fit_ngram(SPACE, b, 2, -1.0), "smoothing"),
        (lambda b: fit_ngram(SPACE, b.take(torch.arange(0))), "no responses"),
        (lambda b: fit_ngram(rl_ebm.TokenSpace(2000, 5), b, 4), "too many"),
        (lambda b: fit_ngram(SPACE, b, 10**8), "too many"),
        (lambda b: fit_ngram(SPACE, b, 2, prompts=[[7]]), "token 7"),
        (lambda b: fit_hmm(SPACE, b, 0), "num_states"),
        (lambda b: fit_hmm(SPACE, b, 1, 0), "iterations"),
        (lambda b: fit_hmm(SPACE, b, 1, 1, -1), "smoothing"),
        (lambda b: fit_hmm(SPACE, b.take(torch.arange(0)), 1), "no responses"),
        (lambda b: AutomatonPolicy(SPACE, hidden(*(2 * x for x in random_law(2, 3)))), "sum to 1"),
        (lambda b: AutomatonPolicy(rl_ebm.TokenSpace(4, 2), hidden(*random_law(2, 3))), "reads 3"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call(corpus(SPACE))


def test_a_step_of_em_adds_the_smoothing_to_every_count():
    batch = corpus(SPACE)
    once, twice = (
        fit_hmm(SPACE, batch, 2, n, 0.7, torch.Generator().manual_seed(1))[0] for n in (1, 2)
    )
    start = once.machine
    law = (start.log_initial[0], start.log_transition, start.log_emission)
    counts, _ = expected_counts(law, batch)
    got = twice.machine
    for count, log_p in zip(
        counts, (got.log_initial[0], got.log_transition, got.log_emission), strict=True
    ):
        share = (count + 0.7) / (count + 0.7).sum(-1, keepdim=True)
        torch.testing.assert_close(log_p.exp(), share)
