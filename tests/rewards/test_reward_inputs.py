"""Wrong kinds of arguments are one sentence, and sizes are checked before memory is taken."""

from __future__ import annotations

import math
import resource

import numpy as np
import pytest
import torch

import rl_ebm
from rl_ebm.rewards import Automaton, Table, TransformerReward, from_trl, parse_reward

SPACE = rl_ebm.TokenSpace(4, 5, eos_id=0)
FIXED = rl_ebm.TokenSpace(2, 5)
WIDE = rl_ebm.TokenSpace(50_000, 64, eos_id=0)
WRONG = [None, 3, "x", [1.0, None], object(), np.zeros((3, 2)), torch.zeros(2, 2).to_sparse()]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """As users have it: without the checks that annotations get in the tests."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


CALLS = {
    "table": lambda x: Table(x),
    "ngram": lambda x: Automaton.ngram(SPACE, x),
    "chain": lambda x: Automaton.chain(SPACE, x),
    "couplings": lambda x: Automaton.chain(SPACE, torch.zeros(5, 4), 3 if x is None else x),
    "hmm": lambda x: Automaton.hmm(SPACE, x, x, x),
    "weighted": lambda x: Automaton.weighted(SPACE, x, x),
    "log_end": lambda x: Automaton.weighted(
        SPACE, torch.zeros(2), torch.zeros(4, 2, 2), 3 if x is None else x
    ),
    "modular": lambda x: Automaton.modular(SPACE, [0.0, 1.0], x if x is not None else 3),
    "scores": lambda x: Automaton.modular(SPACE, x),
    "contains": lambda x: Automaton.contains(SPACE, x),
    "counts": lambda x: Automaton.counts(SPACE, x),
    "hamming": lambda x: Automaton.hamming(SPACE, x),
    "edit": lambda x: Automaton.edit_distance(SPACE, x),
    "score": lambda x: Automaton.contains(SPACE, [1], "x" if isinstance(x, int) else x),
    "depth": lambda x: Automaton.brackets(SPACE, 1, 2, 2.5 if isinstance(x, int) else x),
    "opening": lambda x: Automaton.brackets(SPACE, 9 if isinstance(x, int) else x, 2, 2),
    "pattern": lambda x: Automaton.regex(SPACE, 3 if isinstance(x, str) else x),
    "machine": lambda x: Automaton(SPACE, x),
    "reward": lambda x: rl_ebm.EBM(SPACE, x),
    "expression": lambda x: parse_reward(x, SPACE),
    "trl": lambda x: from_trl(x, str),
    "trl of a list": lambda x: from_trl([x], str),
    "decode": lambda x: from_trl(lambda **_: [], x),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", WRONG, ids=lambda x: type(x).__name__)
def test_a_value_of_another_kind_is_one_sentence(name, value):
    with pytest.raises((TypeError, ValueError)) as error:
        CALLS[name](value)
    assert "\n" not in str(error.value)
    assert "object has no attribute" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: Automaton.contains(s, [1]),
        lambda s: Automaton.counts(s, [1]),
        lambda s: Automaton.regex(s, "1"),
        lambda s: Automaton.ngram(s, torch.zeros(4)),
        lambda s: Automaton.chain(s, torch.zeros(5, 4)),
        lambda s: Automaton.hmm(s, torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 4)),
        lambda s: Automaton.weighted(s, torch.zeros(1), torch.zeros(4, 1, 1)),
        lambda s: Automaton.modular(s, [0.0, 1.0]),
        lambda s: Automaton.brackets(s, 1, 2, 1),
        lambda s: Automaton.hamming(s, [1]),
        lambda s: Automaton.edit_distance(s, [1]),
        lambda s: parse_reward("contains:1", s),
    ],
)
def test_a_space_that_is_none_is_one_sentence(make):
    for wrong in (None, 4, (4, 5), "x"):
        with pytest.raises(TypeError, match="space must be a TokenSpace, got"):
            make(wrong)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Automaton.counts(WIDE, [1] * 65), "no response can hold the phrase: it has 65"),
        (lambda: Automaton.contains(SPACE, [1] * 5), "at most 4 beside its EOS"),
        (lambda: Automaton.avoids(FIXED, [1] * 6), "no response can hold the phrase"),
        (lambda: Automaton.hamming(WIDE, [1] * 10_000), "too many"),
        (lambda: Automaton.edit_distance(WIDE, [1] * 100_000), "too many"),
        (lambda: Automaton.edit_distance(WIDE, list(range(1, 60))), "too many"),
        (lambda: Automaton.modular(WIDE, [0.0] * 10_000), "too many"),
        (lambda: Automaton.ngram(WIDE, torch.zeros(1).expand(50_000, 50_000)), "too many"),
        (
            lambda: Automaton.chain(
                WIDE, torch.zeros(64, 50_000), torch.zeros(1).expand(63, 50_000, 50_000)
            ),
            "too many",
        ),
        (lambda: Automaton.brackets(FIXED, 0, 1, 3), "no response can be balanced"),
        pytest.param(
            lambda: parse_reward(
                " + ".join(f"contains:{i} {i} {i} {i} {i}" for i in range(1, 12)), WIDE
            ),
            "more than",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sizes_are_told_before_memory_is_taken(make, words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2.5e6  # KB
    assert len(str(error.value)) < 400


def test_brackets_deeper_than_a_response_is_long_are_as_deep_as_it():
    tokens, lengths = SPACE.sequences()
    want = Automaton.brackets(SPACE, 1, 2, 5)(tokens, lengths, lengths * 0)
    got = Automaton.brackets(SPACE, 1, 2, 10**12)
    assert torch.equal(got(tokens, lengths, lengths * 0), want)
    assert got.machine.num_states < 10


def test_sums_of_huge_values_modulo_a_number_are_exact():
    values = [0, 2**62, 2**62 + 1, -(2**62)]
    reward = Automaton.modular(SPACE, [0.0, 1.0, 2.0], values)
    tokens, lengths = SPACE.sequences()
    got = reward(tokens, lengths, lengths * 0).tolist()
    want = [
        float(sum(values[a] for a in y[: n - 1]) % 3)
        for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    assert got == want


def test_the_transformer_reward_takes_a_space():
    with pytest.raises(TypeError, match="space must be a TokenSpace"):
        TransformerReward(3)


def test_long_words_have_distances():
    space = rl_ebm.TokenSpace(5, 12, eos_id=0)
    word = [1, 2, 3, 4, 4, 3, 2, 1, 1, 2]
    reward = Automaton.edit_distance(space, word)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 5, (200, 12), generator=g)
    lengths = torch.randint(1, 13, (200,), generator=g)
    tokens[torch.arange(200), lengths - 1] = 0
    got = reward(tokens, lengths, lengths * 0).tolist()
    for y, n, value in zip(tokens.tolist(), lengths.tolist(), got, strict=True):
        row = list(range(len(word) + 1))
        for a in y[: n - 1]:
            new = [row[0] + 1]
            for j, b in enumerate(word):
                new.append(min(new[j] + 1, row[j + 1] + 1, row[j] + (a != b)))
            row = new
        assert value == -row[-1]
    assert not math.isinf(min(got))
