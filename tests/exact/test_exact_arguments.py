"""Wrong arguments of exact solutions, tables and divergences end in one sentence."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
from toy_policies import OTHER_INTEGERS, PROMPTS, seeded

import rl_ebm
from rl_ebm import divergences
from rl_ebm.exact import summarise
from rl_ebm.tokens import TokenSpace


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    """Annotations are checked in the tests alone: users see the library's own sentences."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


SPACE = TokenSpace(3, 2)
SCORES = torch.randn(9, generator=seeded(0), dtype=torch.float64)


def solutions():
    table = rl_ebm.solve(rl_ebm.EBM(SPACE, SCORES))
    reward = rl_ebm.rewards.Automaton.contains(SPACE, [1], 2.0)
    return table, rl_ebm.solve(rl_ebm.EBM(SPACE, reward))


def one_sentence(call, words=""):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    text = str(caught.value)
    assert words in text
    assert 15 < len(text) < 400


@pytest.mark.parametrize("wrong", [None, 3, "ebm", SCORES])
def test_only_an_ebm_is_solved(wrong):
    one_sentence(lambda: rl_ebm.solve(wrong))


@pytest.mark.parametrize("n", [2.5, -1, "3", True, None])
def test_samples_are_counted_in_integers(n):
    for solution in solutions():
        one_sentence(lambda s=solution: s.sample(n))
        assert len(solution.sample(np.int64(2))) == 2
        assert len(solution.sample(0)) == 0


@pytest.mark.parametrize(
    "tokens",
    [
        [[0, 1]],
        np.zeros((1, 2), dtype=np.int64),
        torch.zeros(1, 2),
        torch.zeros(1, 2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.full((1, 2), 3),
        torch.full((1, 2), -1),
        None,
    ],
)
def test_tokens_are_rows_of_ids(tokens):
    for solution in solutions():
        one_sentence(lambda s=solution: s.logits(tokens))
        one_sentence(lambda s=solution: s.log_prob(tokens))


@pytest.mark.parametrize("dtype", OTHER_INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(8, 4, None), (8, 4, 5)], ids=str)
def test_integers_of_any_size_are_solved_and_scored_as_int64(shape, dtype):
    space = TokenSpace(*shape)
    scores = torch.randn(3, space.num_sequences, generator=seeded(0), dtype=torch.float64)
    tokens, lengths = (x[::31] for x in space.sequences())
    ids = torch.arange(len(tokens)) % 3
    for reward in (scores, rl_ebm.rewards.Automaton.contains(space, [1], 2.0)):
        ebm = rl_ebm.EBM(space, reward, 0.5, prompts=PROMPTS)
        solution = rl_ebm.solve(ebm)
        wide, small = ((tokens.to(d), lengths.to(d), ids.to(d)) for d in (torch.int64, dtype))
        scored = [ebm.score(rl_ebm.Batch(*x)).reward for x in (wide, small)]
        pairs = [scored]
        calls = [solution.log_prob, ebm.log_weight, ebm.log_ref, ebm.reward, ebm.reward_model]
        pairs += [[call(*x) for x in (wide, small)] for call in calls]
        pairs += [[call(x[0], x[2]) for x in (wide, small)] for call in two_arguments(solution)]
        pairs += [[steps(solution, *x) for x in (wide, small)]]
        for want, got in pairs:
            assert torch.equal(got, want)


def two_arguments(solution):
    return [solution.logits, *([solution.log_probs] if hasattr(solution, "log_probs") else [])]


def steps(policy, tokens, lengths, ids):
    state = policy.start(ids)
    return torch.stack([policy.step(state, t) for t in (None, *tokens[:, :-1].unbind(1))])


def test_lengths_and_prompt_ids_are_tensors_of_integers():
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    for solution in solutions():
        one_sentence(lambda s=solution: s.log_prob(tokens, [2]))
        one_sentence(lambda s=solution: s.log_prob(tokens, torch.tensor([2.0])))
        one_sentence(lambda s=solution: s.log_prob(tokens, None, [0]))
        one_sentence(lambda s=solution: s.log_prob(tokens, None, torch.tensor([1])), "prompt_ids")
        one_sentence(lambda s=solution: s.sample(1, prompt_ids=[0]))
        for top, prompt in ((2.5, 0), (-1, 0), (3, 1), (3, -1)):
            one_sentence(lambda s=solution, t=top, p=prompt: summarise(s, t, p))


def test_tables_are_lists_of_tensors_of_the_space():
    tables = [t[0] for t in solutions()[0].tables()]
    for f in (rl_ebm.q_from_r, rl_ebm.r_from_q):
        for wrong in (
            [t.tolist() for t in tables],
            [t.numpy() for t in tables],
            [t.long() for t in tables],
            tables[:1],
            [tables[0], tables[1][:2]],
            tables[1],
            None,
            [],
        ):
            one_sentence(lambda f=f, x=wrong: f(x, SPACE))
        one_sentence(lambda f=f: f(tables, 3))
        one_sentence(lambda f=f: f(SPACE, tables))


def test_divergences_are_of_log_probabilities_over_the_same_outcomes():
    p = torch.randn(4, generator=seeded(1)).log_softmax(0)
    for f in (divergences.kl, divergences.tv, divergences.js):
        one_sentence(lambda f=f: f(p, p[:3]))
        one_sentence(lambda f=f: f([0.0], p))
        one_sentence(lambda f=f: f(p.exp(), p), "log-probabilities are at most 0")
        one_sentence(lambda f=f: f(p, p + 3), "log-probabilities are at most 0")
        one_sentence(lambda f=f: f(p.long(), p))
    one_sentence(lambda: divergences.entropy(p.exp()), "log-probabilities are at most 0")


@pytest.mark.parametrize("bad", [2.5, "4", True, None, 10**18, float("nan"), -1, 0])
def test_sizes_of_a_space_are_integers_in_range(bad):
    one_sentence(lambda: TokenSpace(bad, 3), "vocab_size must be")
    one_sentence(lambda: TokenSpace(3, bad), "max_length must be")
    if bad not in (0, None):
        one_sentence(lambda: TokenSpace(3, 3, bad), "eos_id must be")
    made = TokenSpace(np.int64(4), np.int32(3), np.int64(1))
    assert made == TokenSpace(4, 3, 1)
    assert [type(x) for x in (made.vocab_size, made.max_length, made.eos_id)] == [int] * 3
