"""Every constructor of automaton rewards against plain Python on all responses."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_ebm
from rl_ebm.rewards import Automaton
from rl_ebm.rewards.automaton import total

SPACES = [
    rl_ebm.TokenSpace(3, 4),
    rl_ebm.TokenSpace(3, 5, eos_id=0),
    rl_ebm.TokenSpace(4, 4, eos_id=3),
    rl_ebm.TokenSpace(2, 6, eos_id=1),
    rl_ebm.TokenSpace(2, 1),
]
in_all_spaces = pytest.mark.parametrize("space", SPACES, ids=str)


def check(space, reward, expected, real_only=False):
    """R of every response against a Python function of its list of tokens."""
    tokens, lengths = space.sequences()
    got = reward(tokens, lengths, torch.zeros_like(lengths)).tolist()
    for y, n, value in zip(tokens.tolist(), lengths.tolist(), got, strict=True):
        y = y[:n]
        if real_only and space.eos_id is not None:
            y = y[:-1]
        want = expected(y)
        assert value == pytest.approx(want, rel=1e-12, abs=1e-12), y


def check_match(space, make, expected):
    """A reward that pays where ``expected`` says so, and is refused where that is nowhere."""
    tokens, lengths = space.sequences()
    stop = int(space.eos_id is not None)
    if not any(
        expected(y[: n - stop]) for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ):
        with pytest.raises(ValueError, match="no response can"):
            make()
        return
    check(space, make(), expected, real_only=True)


def places(y, phrase):
    return [i for i in range(len(y) - len(phrase) + 1) if y[i : i + len(phrase)] == phrase]


def phrases(space):
    """All phrases of three tokens at most that a response can hold, and need not."""
    for n in range(1, min(3, space.max_length) + 1):
        for phrase in itertools.product(range(space.vocab_size), repeat=n):
            if space.eos_id not in phrase[:-1] and phrase != (space.eos_id,):
                yield list(phrase)


@in_all_spaces
def test_phrases(space):
    for phrase in phrases(space):

        def found(y, phrase=phrase):
            return len(places(y, phrase))

        check(space, Automaton.contains(space, phrase, 1.5), lambda y, n=found: 1.5 * bool(n(y)))
        check(space, Automaton.counts(space, phrase, -2), lambda y, n=found: -2 * n(y))
        avoids = Automaton.avoids(space, phrase)
        assert avoids.forbids
        check(space, avoids, lambda y, n=found: -math.inf if n(y) else 0.0)


def test_overlapping_occurrences_of_a_long_phrase_count():
    space = rl_ebm.TokenSpace(2, 12)
    phrase = [0, 1, 0, 0, 1, 0]
    check(space, Automaton.counts(space, phrase, 1), lambda y: len(places(y, phrase)))


PATTERNS = [
    "",
    "0*",
    "(01|2)*",
    "0?1+2?",
    "[01]{2,3}",
    "[^0]+",
    "0.1",
    "(?:0|1)*2{1}",
    "^01*$",
    ".*",
    "00|11|",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "space",
    [rl_ebm.TokenSpace(3, 4), rl_ebm.TokenSpace(4, 5, eos_id=3), rl_ebm.TokenSpace(3, 3, 2)],
)
def test_patterns_over_ids(space, pattern):
    if str(space.eos_id) in pattern:
        pytest.skip("EOS is no part of a match")
    compiled = re.compile(pattern)

    def expected(y):
        return 2.0 * (compiled.fullmatch("".join(map(str, y))) is not None)

    check_match(space, lambda: Automaton.regex(space, pattern, 2.0), expected)
    spaced = " ".join(pattern) if "{" not in pattern else pattern
    check_match(space, lambda: Automaton.regex(space, spaced, 2.0), expected)


@pytest.mark.parametrize(
    "pattern", [r"a*b", r"\d+|ab+", r"[a-c]\w*", r"(ab|b.)*?", r"a{3}", r"[^\d]*"]
)
def test_patterns_over_text(pattern):
    alphabet = ["a", "b", "ab", "7", "<eos>"]
    space = rl_ebm.TokenSpace(5, 4, eos_id=4)
    compiled = re.compile(pattern)

    def expected(y):
        return float(compiled.fullmatch("".join(alphabet[a] for a in y)) is not None)

    check(space, Automaton.regex(space, pattern, 1.0, alphabet), expected, real_only=True)
    check(space, Automaton.regex(space, pattern, 1.0, alphabet[:-1]), expected, real_only=True)


def test_ids_of_large_vocabularies_are_numbers():
    space = rl_ebm.TokenSpace(12, 2)
    reward = Automaton.regex(space, "11 (1|2) | [3-5]{2} | 10.", 1.0)

    def expected(y):
        return float(
            (y[0] == 11 and y[1] in (1, 2))
            or (y[0] in (3, 4, 5) and y[1] in (3, 4, 5))
            or y[0] == 10
        )

    check(space, reward, expected)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_random_patterns(seed):
    rng = random.Random(seed)

    def part(depth):
        kind = rng.choice("llaasr" if depth else "la")
        if kind == "l":
            return rng.choice("012")
        if kind == "a":
            return rng.choice([".", "[01]", "[^2]", "(?:)"])
        if kind == "s":
            return "(" + "|".join(part(depth - 1) for _ in range(2)) + ")"
        return "(?:" + part(depth - 1) + ")" + rng.choice(["*", "+", "?", "{2}", "{1,2}", "{2,}"])

    pattern = "".join(part(3) for _ in range(rng.randint(1, 4)))
    compiled = re.compile(pattern)
    space = rl_ebm.TokenSpace(3, 4)
    check_match(
        space,
        lambda: Automaton.regex(space, pattern, 1.0),
        lambda y: float(compiled.fullmatch("".join(map(str, y))) is not None),
    )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("0(1", ["position 1"]),
        ("01 07", ["token 7", "position 4"]),
        (r"(0)\1", ["groupref"]),
        ("(?=0)1", ["assert"]),
        ("(?i)1", ["flags"]),
        ("0*+", ["possessive"]),
        ("(0{300}){300}", ["states", "repeat less"]),
    ],
)
def test_a_bad_pattern_says_where_and_why(pattern, words):
    with pytest.raises(ValueError, match="pattern") as error:
        Automaton.regex(rl_ebm.TokenSpace(3, 4), pattern)
    assert [word for word in words if word not in str(error.value)] == []


@in_all_spaces
@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams(space, n):
    g = torch.Generator().manual_seed(n)
    table = torch.randn((space.vocab_size,) * n, generator=g, dtype=torch.float64)
    table[(0,) * n] = -math.inf

    def expected(y):
        return sum(float(table[tuple(y[i : i + n])]) for i in range(len(y) - n + 1))

    check(space, Automaton.ngram(space, table), expected)


@in_all_spaces
def test_chains(space):
    g = torch.Generator().manual_seed(0)
    a, t_max = space.vocab_size, space.max_length
    fields = torch.randn(t_max, a, generator=g)
    couplings = torch.randn(t_max - 1, a, a, generator=g)

    def alone(y):
        return sum(float(fields[t, x]) for t, x in enumerate(y))

    def together(y):
        pairs = enumerate(itertools.pairwise(y))
        return alone(y) + sum(float(couplings[t, x, z]) for t, (x, z) in pairs)

    check(space, Automaton.chain(space, fields), alone)
    check(space, Automaton.chain(space, fields, couplings), together)


@in_all_spaces
def test_counters_and_brackets(space):
    scores = [0.5, -1.0, 2.0]

    def modular(y):
        return scores[sum(y) % 3]

    check(space, Automaton.modular(space, scores), modular, real_only=True)
    values = torch.arange(space.vocab_size) % 2
    check(
        space,
        Automaton.modular(space, [0.0, 3.0], values),
        lambda y: 3.0 * (sum(int(values[a]) for a in y) % 2),
        real_only=True,
    )
    if space.vocab_size < 3:
        return
    opening, closing = [a for a in range(space.vocab_size) if a != space.eos_id][:2]

    def balanced(y, depth):
        level = 0
        for a in y:
            level += (a == opening) - (a == closing)
            if not 0 <= level <= depth:
                return 0.0
        return 1.5 * (level == 0)

    for depth in (1, 2):
        reward = Automaton.brackets(space, opening, closing, depth, 1.5)
        check(space, reward, lambda y, d=depth: balanced(y, d), real_only=True)


def levenshtein(x, y):
    if not x or not y:
        return len(x) + len(y)
    return min(
        levenshtein(x[1:], y) + 1,
        levenshtein(x, y[1:]) + 1,
        levenshtein(x[1:], y[1:]) + (x[0] != y[0]),
    )


@in_all_spaces
@pytest.mark.parametrize("length", [1, 2, 3])
def test_distances(space, length):
    letters = [a for a in range(space.vocab_size) if a != space.eos_id]
    for word in itertools.product(letters, repeat=length):
        word = list(word)

        def hamming(y, word=word):
            same = sum(a == b for a, b in zip(y, word, strict=False))
            return -0.5 * (max(len(y), len(word)) - same)

        check(space, Automaton.hamming(space, word, -0.5), hamming, real_only=True)
        check(
            space,
            Automaton.edit_distance(space, word, -2.0),
            lambda y, w=word: -2.0 * levenshtein(y, w),
            real_only=True,
        )


@in_all_spaces
def test_hmm(space):
    g = torch.Generator().manual_seed(0)
    h, a = 3, space.vocab_size
    initial, transition, emission = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((h,), (h, h), (h, a))
    )
    emission[0, 1] = transition[1, 2] = -math.inf

    def expected(y):
        weight = 0.0
        for z in itertools.product(range(h), repeat=len(y)):
            log = float(initial[z[0]]) + sum(
                float(emission[s, x]) for s, x in zip(z, y, strict=True)
            )
            weight += math.exp(log + sum(float(transition[s, n]) for s, n in itertools.pairwise(z)))
        return math.log(weight)

    check(space, Automaton.hmm(space, initial, transition, emission), expected)
    one = Automaton.hmm(space, initial[:1], transition[:1, :1], emission[2:])
    assert one.machine.num_hidden == 1
    check(
        space,
        one,
        lambda y: (
            float(initial[0])
            + sum(float(emission[2, x]) for x in y)
            + (len(y) - 1) * float(transition[0, 0])
        ),
    )


@in_all_spaces
def test_sums_are_sums(space):
    parts = [
        Automaton.counts(space, [0], 0.5),
        Automaton.modular(space, [0.0, 1.0]),
        Automaton.ngram(space, torch.arange(space.vocab_size).double()),
    ]
    tokens, lengths = space.sequences()
    ids = torch.zeros_like(lengths)
    want = sum(p(tokens, lengths, ids) for p in parts)
    for got in (parts[0] + parts[1] + parts[2], sum(parts), total(parts)):
        torch.testing.assert_close(got(tokens, lengths, ids), want, rtol=1e-12, atol=1e-12)


def test_sums_are_minimal_where_that_is_cheap():
    space = rl_ebm.TokenSpace(5, 6)
    once = Automaton.contains(space, [1, 2], 1.0)
    assert once.machine.num_states == 3
    assert (once + once).machine.num_states == 3
    other = Automaton.contains(space, [2, 3], 1.0)
    assert (once + other).machine.num_states < 9
    # A counter of which every second state is the same.
    assert Automaton.modular(space, [0.0, 1.0, 0.0, 1.0]).machine.num_states == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: Automaton.contains(s, []), "empty"),
        (lambda s: Automaton.contains(s, [7]), "holds 7"),
        (lambda s: Automaton.contains(s, [0, 1]), "after EOS"),
        (lambda s: Automaton.contains(s, [1], math.inf), "below"),
        (lambda s: Automaton.counts(s, [1], math.nan), "below"),
        (lambda s: Automaton.ngram(s, torch.zeros(3, 4)), "shape"),
        (lambda s: Automaton.ngram(s, torch.full((3,), math.nan)), "nan"),
        (lambda s: Automaton.chain(s, torch.zeros(2, 3)), "fields"),
        (lambda s: Automaton.chain(s, torch.zeros(4, 3), torch.zeros(4, 3, 3)), "couplings"),
        (lambda s: Automaton.hmm(s, torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 4)), "log_e"),
        (lambda s: Automaton.modular(s, []), "scores"),
        (lambda s: Automaton.modular(s, [0.0], torch.zeros(2).long()), "values"),
        (lambda s: Automaton.brackets(s, 1, 1, 2), "two tokens"),
        (lambda s: Automaton.brackets(s, 1, 2, 0), "depth"),
        (lambda s: Automaton.hamming(s, [0], 1.0), "EOS"),
        (lambda s: Automaton.edit_distance(s, [1], -math.inf), "finite"),
        (lambda s: Automaton.regex(s, "1", 1.0, ["a"]), "alphabet"),
        (
            lambda s: Automaton.contains(s, [1]) + Automaton.contains(rl_ebm.TokenSpace(3, 5), [1]),
            "for",
        ),
        (lambda s: rl_ebm.EBM(rl_ebm.TokenSpace(3, 5), Automaton.contains(s, [1])), "was made for"),
        (lambda s: total([]), "at least one"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make(rl_ebm.TokenSpace(3, 4, eos_id=0))
    assert "\n" not in str(error.value)


def test_values_as_large_as_integers_get_are_summed_modulo():
    space, most = rl_ebm.TokenSpace(3, 2), 2**63 - 1
    values = [most, most - 1, -most]
    reward = Automaton.modular(space, [0.0, 1.0, 2.0, 3.0, 4.0], values)
    tokens, lengths = space.sequences()
    got = reward(tokens, lengths, torch.zeros_like(lengths)).tolist()
    assert got == [sum(values[a] for a in y) % 5 for y in tokens.tolist()]
