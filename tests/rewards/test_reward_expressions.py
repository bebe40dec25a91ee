"""Rewards as the command line writes them."""

from __future__ import annotations

import pytest
import torch

import rl_ebm
from rl_ebm.rewards import Automaton, parse_reward

SPACE = rl_ebm.TokenSpace(4, 4, eos_id=0)


def values(reward):
    tokens, lengths = SPACE.sequences()
    return reward(tokens, lengths, torch.zeros_like(lengths))


CASES = {
    "contains:1 2": lambda: Automaton.contains(SPACE, [1, 2]),
    " contains: 1  2 ": lambda: Automaton.contains(SPACE, [1, 2]),
    "2.5*contains:1 2": lambda: Automaton.contains(SPACE, [1, 2], 2.5),
    "-1e-1 * counts:3": lambda: Automaton.counts(SPACE, [3], -0.1),
    "avoids:3 3": lambda: Automaton.avoids(SPACE, [3, 3]),
    "avoid:3": lambda: Automaton.avoids(SPACE, [3]),
    "regex:(1|2)+3?": lambda: Automaton.regex(SPACE, "(1|2)+3?"),
    'regex:"1 + 2" + counts:3': lambda: (
        Automaton.regex(SPACE, "1+2") + Automaton.counts(SPACE, [3])
    ),
    "-2*hamming:1 3 2": lambda: Automaton.hamming(SPACE, [1, 3, 2], -2),
    "-1*edit:1 3": lambda: Automaton.edit_distance(SPACE, [1, 3], -1),
    "3*parity:1": lambda: Automaton.modular(SPACE, [0.0, 3.0]),
    "parity:0": lambda: Automaton.modular(SPACE, [1.0, 0.0]),
    "contains:1 + contains:2 + avoids:3": lambda: (
        Automaton.contains(SPACE, [1])
        + Automaton.contains(SPACE, [2])
        + Automaton.avoids(SPACE, [3])
    ),
}


@pytest.mark.parametrize("expression", CASES)
def test_expressions(expression):
    want = values(CASES[expression]())
    assert len(want.unique()) > 1
    assert torch.equal(values(parse_reward(expression, SPACE)), want)


def test_symbols():
    alphabet = [".", "a", "b", "c"]
    got = values(parse_reward("contains:ab + regex:a[bc]*", SPACE, alphabet))
    want = Automaton.contains(SPACE, [1, 2]) + Automaton.regex(SPACE, "1[23]*")
    assert torch.equal(got, values(want))
    words = ["<eos>", "good", "bad", "not"]
    got = values(parse_reward("avoids:not good", SPACE, words))
    assert torch.equal(got, values(Automaton.avoids(SPACE, [3, 1])))


@pytest.mark.parametrize(
    ("expression", "position", "words"),
    [
        ("contain:1", 0, "did you mean 'contains'"),
        ("contains:1 + count:2", 13, "did you mean 'counts'"),
        ("contains", 0, "KIND:ARGUMENT"),
        ("", 0, "KIND:ARGUMENT"),
        ("contains:1 + ", 12, "KIND:ARGUMENT"),
        ("contains:1 x", 9, "'x' is no token id"),
        ("contains:9", 9, "ids are in [0, 4)"),
        ("contains:", 9, "empty"),
        ("two*contains:1", 0, "'two' is no number"),
        ("nan*contains:1", 13, "score"),
        ("2*avoids:1", 9, "factor"),
        ("counts:1 + regex:1(2", 17, "position 1"),
        ("parity:2", 7, "parity is 0 or 1"),
    ],
)
def test_faults_have_their_position(expression, position, words):
    with pytest.raises(ValueError, match="reward") as error:
        parse_reward(expression, SPACE)
    assert f"position {position}:" in str(error.value)
    assert words in str(error.value)


def test_a_symbol_outside_of_the_alphabet():
    with pytest.raises(ValueError, match="'z' is not in the alphabet"):
        parse_reward("contains:az", SPACE, ".abc")
