"""Patterns against Python's ``re`` on all texts: anchors, boundaries, limits, what cannot match."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest
import torch
from test_automaton_rewards import check_match

import rl_ebm
from rl_ebm.rewards import Automaton

TEXTS = ["a", "_", " ", "\n", "é", "-a", ""]
SPACE = rl_ebm.TokenSpace(7, 5, eos_id=6)


def agrees(pattern, space=SPACE, texts=TEXTS):
    compiled = re.compile(pattern)

    def expected(y):
        return float(compiled.fullmatch("".join(texts[a] for a in y)) is not None)

    check_match(space, lambda: Automaton.regex(space, pattern, 1.0, texts), expected)


ANCHORED = [
    r"\ba\b.*",
    r".*\b",
    r"\B.*",
    r"[\s\S]*\Ba\B[\s\S]*",
    r"(\b|-)[\s\S]*",
    r"^a$",
    r"a$\n",
    r"a$\n*",
    r"(a$)?[\n ]*",
    r"a\Z\n?",
    r"\Aa\Z|\A$\n",
    r"(^|a)+é",
    r"(a|$|\n)*",
    r"^^a$$",
    r"a^",
    r"$a",
    r"($\n$){1,2}",
    r"(\w+\b\W*)*",
    r"(\b\w|\B\w)*",
    r"\b",
    r"\B",
    r"$",
    r"(?!)|a",
    r"[^\W_]+",
    r"[\b]|a",
]


@pytest.mark.parametrize("pattern", ANCHORED)
def test_anchors_and_boundaries(pattern):
    agrees(pattern)


@pytest.mark.parametrize("seed", range(40))
def test_random_patterns_with_anchors(seed):
    draw = random.Random(seed)

    def part(depth):
        kind = draw.choice("lllsaagr" if depth else "lsa")
        if kind == "l":
            return draw.choice(["a", "_", " ", r"\n", "é", "-"])
        if kind == "s":
            return draw.choice([".", r"\w", r"\W", r"\s", "[^a]", r"[a\n]", r"[\s\S]"])
        if kind == "a":
            return draw.choice([r"\b", r"\B", "^", "$", r"\A", r"\Z"])
        inner = "".join(part(depth - 1) for _ in range(draw.randint(1, 3)))
        if kind == "g":
            return f"({inner}|{part(depth - 1)})"
        return f"(?:{inner})" + draw.choice(["*", "+", "?", "{2}", "{0,2}", "*?"])

    pattern = "".join(part(2) for _ in range(draw.randint(1, 4))) + draw.choice(["", r"[\s\S]*"])
    agrees(pattern, rl_ebm.TokenSpace(7, 4, eos_id=6))


def test_ids_are_words():
    space = rl_ebm.TokenSpace(3, 3)
    compiled = re.compile(r"\b0\B.*1\b")
    check_match(
        space,
        lambda: Automaton.regex(space, r"\b0\B.*1\b"),
        lambda y: float(compiled.fullmatch("".join(map(str, y))) is not None),
    )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(a)\1", r"a back-reference"),
        ("(?=a)a", "look-ahead"),
        ("(?<=a)a", "look-behind"),
        ("(?<!a)a", "negative look-ahead or look-behind"),
        ("(a)?(?(1)a|_)", "condition on a group"),
        ("a*+", "possessive"),
        ("(?>a)", "atomic"),
        ("(?i:a)", "sets flags"),
        ("(?s)a", "sets flags"),
        ("0{4294967295}", "repeat less"),
        ("a{4294967294}", "repeat less"),
        ("(){10000000}", "repeat less"),
        ("((){1000}){1000}", "repeat less"),
        ("(" * 200 + "a" + ")" * 200, "nests more than 100 groups"),
        ("(" * 20_000, "nests more than 100 groups"),
        (".*(a.{2000}|_){7}", "repeat less"),
        pytest.param("(a?){3000}", "repeat less", marks=pytest.mark.slow),
        (".*a.{9000}", "repeat less"),
        ("a" * 50_000, "repeat less"),
        ("[" * 50_000, "not valid"),
    ],
)
def test_what_is_not_done_is_named_before_work(pattern, words):
    start = time.process_time()
    with pytest.raises(ValueError, match=words) as error:
        Automaton.regex(SPACE, pattern, 1.0, TEXTS)
    assert time.process_time() - start < 8
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_deep_groups_within_the_limit():
    agrees("(" * 100 + "a" + ")" * 100)


def test_brackets_in_sets_are_no_groups():
    agrees(r"[]([(]*" + r"\(" * 0 + "a" + "[(]?" * 120, rl_ebm.TokenSpace(7, 2, eos_id=6))


@pytest.mark.parametrize(
    ("pattern", "space", "alphabet", "words"),
    [
        ("cat", rl_ebm.TokenSpace(4, 5), ["c", "t", "a", "z"], "no match has exactly 5 tokens"),
        (" cat", rl_ebm.TokenSpace(3, 5, 2), ["Ġcat", "s", ""], "no token's text has ' '"),
        (" cat", rl_ebm.TokenSpace(3, 5, 2), ["Ġcat", "s", ""], r"alphabet_of\(tokenizer\)"),
        ("zebra", rl_ebm.TokenSpace(3, 9, 2), ["a", "b", ""], "no token's text has 'e', 'r', 'z'"),
        ("aaaa", rl_ebm.TokenSpace(2, 4, 1), ["a", ""], "shortest match has 4 tokens, .* most 3"),
        ("ab", rl_ebm.TokenSpace(3, 4, 2), ["a", "bb", ""], "no sequence of tokens"),
        ("(?!)", rl_ebm.TokenSpace(3, 4, 2), ["a", "b", ""], "no sequence of tokens"),
        ("0?1", rl_ebm.TokenSpace(2, 3), None, "no match has exactly 3 tokens, the shortest has 1"),
        ("(00)*", rl_ebm.TokenSpace(2, 1001), None, "no match has exactly 1001"),
    ],
)
def test_a_pattern_that_nothing_matches_is_refused_with_the_reason(pattern, space, alphabet, words):
    with pytest.raises(ValueError, match=f"no response can match .*{words}"):
        Automaton.regex(space, pattern, 1.0, alphabet)


def test_whether_something_matches_is_known_at_any_length():
    for length in (999_999, 1_000_000):
        space = rl_ebm.TokenSpace(2, length)
        if length % 2:
            with pytest.raises(ValueError, match="no response can match"):
                Automaton.regex(space, "(01)*")
        else:
            assert Automaton.regex(space, "(01)*").machine.num_states > 1


def test_every_kind_of_character_counts_alike_for_all_alphabets():
    # One sample stands for its kind: each character of a large alphabet against re.
    texts = [chr(c) for c in range(1, 1500)]
    space = rl_ebm.TokenSpace(len(texts), 1)
    tokens, lengths = space.sequences()
    for pattern in (r"\w", r"\W", r"\d", r"\s", "[a-zà-ÿ]", r"[^\w\s]", ".", r"[\D5]"):
        got = Automaton.regex(space, pattern, 1.0, texts)(tokens, lengths, lengths * 0)
        want = [float(re.fullmatch(pattern, text) is not None) for text in texts]
        assert got.tolist() == want


def test_wrong_kinds_are_refused(monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in (
        lambda: Automaton.regex(SPACE, 3),
        lambda: Automaton.regex(SPACE, b"a"),
        lambda: Automaton.regex(SPACE, "a", "x"),
        lambda: Automaton.regex(SPACE, "a", 1.0, 3),
        lambda: Automaton.regex(SPACE, "a", 1.0, [1, 2, 3, 4, 5, 6, 7]),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert "\n" not in str(error.value)


def test_all_texts_of_length_three_at_a_glance():
    # A second route: the language of a pattern is a set of strings.
    texts = ["a", "b"]
    space = rl_ebm.TokenSpace(2, 3)
    tokens, lengths = space.sequences()
    got = Automaton.regex(space, r"\ba.*b$", 1.0, texts)(tokens, lengths, lengths * 0)
    want = {"aab", "abb"}
    names = ["".join(x) for x in itertools.product("ab", repeat=3)]
    assert torch.equal(got, torch.tensor([float(n in want) for n in names]).double())
