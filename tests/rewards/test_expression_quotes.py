"""Expressions: what is quoted stays as it is, and faults have their position."""

from __future__ import annotations

import pytest
import torch

import rl_ebm
from rl_ebm.rewards import Automaton, parse_reward

ALPHABET = ["a", " ", "+", '"', "*", ":", "\t", "\\", "$"]
SPACE = rl_ebm.TokenSpace(9, 4, eos_id=8)


def same(expression, *phrases):
    """Whether an expression pays for phrases, their symbols counted one by one."""
    tokens, lengths = SPACE.sequences()
    got = parse_reward(expression, SPACE, ALPHABET)(tokens, lengths, lengths * 0)
    want = torch.zeros(len(tokens), dtype=torch.float64)
    rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
    texts = ["".join(ALPHABET[a] for a in y[: n - 1]) for y, n in rows]
    for score, phrase in phrases:
        want += torch.tensor([score * (phrase in text) for text in texts])
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("expression", "phrases"),
    [
        ('3*contains:" a"', [(3, " a")]),
        ('3*contains: " a" ', [(3, " a")]),
        ('contains:"a "', [(1, "a ")]),
        ('contains:"  "', [(1, "  ")]),
        ("contains: a ", [(1, "a")]),
        ('contains:"\ta\t"', [(1, "\ta\t")]),
        ('contains:" + "', [(1, " + ")]),
        ('contains:"a*a" + 2*contains:"+"', [(1, "a*a"), (2, "+")]),
        ('contains:"+" + contains:"*a:"', [(1, "+"), (1, "*a:")]),
        ('contains:""""', [(1, '"')]),
        ('contains:"a""a"', [(1, 'a"a')]),
        ('contains:"a\\"', [(1, "a\\")]),
        ("contains:a\\", [(1, "a\\")]),
        ('contains:a"', [(1, 'a"')]),
        ("contains:a + contains:a a", [(1, "a"), (1, "a a")]),
        ("contains:a*a", [(1, "a*a")]),
        ('contains:"a"+contains:" "', [(1, "a"), (1, " ")]),
    ],
)
def test_what_is_quoted_stands_as_it_is(expression, phrases):
    same(expression, *phrases)


def test_a_quoted_pattern_stands_as_it_is():
    tokens, lengths = SPACE.sequences()
    for text in (" a", "a ", r"\ta", " *", r" \+a", '"a'):
        expression = 'regex:"' + text.replace('"', '""') + '"'
        got = parse_reward(expression, SPACE, ALPHABET)(tokens, lengths, lengths * 0)
        want = Automaton.regex(SPACE, text, 1.0, ALPHABET)(tokens, lengths, lengths * 0)
        assert torch.equal(got, want)
        assert len(got.unique()) == 2


@pytest.mark.parametrize(
    ("expression", "position", "words"),
    [
        ('contains:"a', 9, "the quotes are not closed"),
        ('contains:"a" a', 12, "after the quotes"),
        ('contains:"a\\"a"', 13, "a quote in them is written twice"),
        ('contains:""', 10, "empty"),
        ("1_0*contains:a", 0, "'1_0' is no number"),
        ("\u0663*contains:a", 0, "is no number"),
        ("1e999*contains:a", 0, "no number that is finite"),
        ("-1e999*contains:a", 0, "no number that is finite"),
        ("inf*contains:a", 15, "score"),
        ("contains:z", 9, "'z' is not in the alphabet"),
        ("contains:aaaa", 9, "no response can hold the phrase"),
        ("regex:aaaa", 6, "no response can match"),
    ],
)
def test_faults_have_their_position(expression, position, words):
    with pytest.raises(ValueError, match="reward") as error:
        parse_reward(expression, SPACE, ALPHABET)
    if words != "score":
        assert f"position {position}:" in str(error.value)
    assert words in str(error.value)


def test_an_alphabet_without_eos_names_the_same_tokens():
    space = rl_ebm.TokenSpace(3, 4, eos_id=0)
    tokens, lengths = space.sequences()
    got = parse_reward("contains:ab", space, "ab")(tokens, lengths, lengths * 0)
    want = parse_reward("contains:1 2", space)(tokens, lengths, lengths * 0)
    assert torch.equal(got, want)
