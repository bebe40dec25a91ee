"""Expressions: what is quoted stays, and no text of any kind ends in anything but a sentence."""

from __future__ import annotations

import random
import resource
import time

import pytest
import torch

import rl_ebm
from rl_ebm.references import parse_reference
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


SEEDS = [
    "3*contains:1 2 + avoids:7 7",
    'regex:"(0|1)* 2+" + -1*edit:1 2 3',
    "2*counts:1 + 3*parity:1 + hamming:1 2",
    r"regex:\b1[^2]{1,3}$ + contains:3",
    "regex:(?:1|2){2,}.*?",
]
PARTS = [
    '"', '""', "\\", "*", "+", " + ", ":", "regex:", "contains:", "counts:", "edit:", "avoids:",
    "nan", "inf", "1e999", "-", "99999999999999999999", "4294967295", "\u0663", "\x00", "\n", "\t",
    "(", ")", "[", "]", "{", "}", "{9999}", "{0,4000}", "(?=", "(?i)", "(?P<x>", r"\1", r"\b",
    "^", "$", "|", "(" * 150, "()" * 90, "(a?){60}", "1 2 3 1 2 3 " * 9, "é", "\U0001f600", "",
]  # fmt: skip


def mutated(draw, seeds, parts):
    text = draw.choice(seeds)
    for _ in range(draw.randint(1, 6)):
        i, j = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        j = min(j, i + draw.randint(0, 5))
        text = text[:i] + draw.choice([*parts, text[i:j] * 2]) + text[j:]
    return text


def survives(call):
    start = time.process_time()
    try:
        call()
    except (ValueError, TypeError, MemoryError) as error:
        message = str(error)
        assert message
        assert len(message) < 1000
    assert time.process_time() - start < 10


def fuzz(count, seed):
    draw = random.Random(seed)
    spaces = [
        (rl_ebm.TokenSpace(8, 9, eos_id=0), None),
        (rl_ebm.TokenSpace(40, 300), None),
        (rl_ebm.TokenSpace(4, 6, eos_id=3), "12 "),
        (rl_ebm.TokenSpace(4, 6), ["1", "12", " 2", "3"]),
    ]
    for _ in range(count):
        text, (space, alphabet) = mutated(draw, SEEDS, PARTS), draw.choice(spaces)
        survives(lambda text=text, s=space, a=alphabet: parse_reward(text, s, a))


def test_mutated_expressions_end_in_sentences():
    fuzz(60, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_mutated_expressions_end_in_sentences(seed):
    fuzz(300, seed + 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # KB


@pytest.mark.slow
def test_many_mutated_references_end_in_sentences(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("1 2\n2 1 1\n\n3\n")
    seeds = [
        f"ngram:{path}?order=2&smoothing=0.5",
        f"hmm:{path}?states=3&iterations=2&smoothing=0.1&seed=1",
        "uniform",
    ]
    parts = [
        "?",
        "&",
        "=",
        "order",
        "states=",
        "9",
        "0",
        "-1",
        "1e999",
        "nan",
        "\x00",
        ":",
        "\u0663",
    ]
    parts += ["99999999999", "smoothing=", "iterations=", "seed=", "hmm:", "ngram:", "é", "/dev"]
    draw = random.Random(5)
    space = rl_ebm.TokenSpace(4, 5, eos_id=0)
    for _ in range(600):
        text = mutated(draw, seeds, parts)
        survives(lambda text=text: parse_reference(text, space))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # KB
