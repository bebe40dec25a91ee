"""Reward expressions: terms of every kind with faults in them, over small and large spaces."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rl_ebm
from rl_ebm.exact import summarise
from rl_ebm.rewards import parse_reward

from . import judge
from .mutate import NUMBERS, spoil

COUNT = 2500
SYMBOLS = ("abcd", "01ab", "a +*", '"\\|(', "éßĠ😀")


ATOMS = (
    ".", "[01]", "[^0]", "[a-c]", "[]", "[^]", r"\d", r"\w", r"\b", "^", "$",
    "(?=0)", r"\1", r"\0",
    r"\x41", "(?i)", "(?P<n>0)", "(?:", r"\Z",
)  # fmt: skip
REPEATS = ("*", "+", "?", "*?", "++", "**", "{2}", "{,2}", "{1,}", "{2,1}")
COUNTS = ("0", "3", "40", "4294967295", "10000000", "-1", "1,9999")


@dataclass(frozen=True)
class Case:
    """An expression, the sizes of its space, and the alphabet that it is written in."""

    expression: str
    vocab_size: int
    max_length: int
    eos_id: int | None
    alphabet: str | None
    command: bool


def case(seed: int) -> Case:
    rng = random.Random(f"expressions {seed}")
    size, length = rng.choice((2, 3, 4, 40)), rng.choice((1, 2, 3, 5, 64, 300))
    eos = rng.choice((None, None, 0, size - 1))
    alphabet = None
    if rng.random() < 0.4 and size <= 4:
        alphabet = rng.choice(SYMBOLS)[:size]
    symbols = [str(i) for i in range(size)] if alphabet is None else list(alphabet)
    joint = rng.choice((" + ",) * 6 + ("+", " +", " - ", "  +  ", " + + ", ", "))
    text = joint.join(_term(rng, symbols, alphabet) for _ in range(rng.choice((1, 1, 2, 3))))
    text = spoil(rng, text, rng.choice((0, 0, 0, 1, 1, 3)))
    if rng.random() < 0.02:
        text = joint.join([text] * rng.choice((20, 200)))
    return Case(text, size, length, eos, alphabet, rng.random() < 0.25)


def _term(rng: random.Random, symbols: list[str], alphabet: str | None) -> str:
    kind = rng.choice(
        ("contains", "avoids", "avoid", "counts", "hamming", "edit", "parity", *["regex"] * 4)
    )
    if kind == "parity":
        argument = rng.choice(("0", "1", "1", "2", ""))
    elif kind == "regex":
        argument = _pattern(rng, symbols, 3)
    else:
        gap = " " if alphabet is None else ""
        argument = gap.join(rng.choice(symbols) for _ in range(rng.choice((0, 1, 1, 2, 3, 6, 70))))
    if rng.random() < 0.3:
        argument = f'"{argument}"'
    factor = "" if rng.random() < 0.5 else f"{rng.choice((*NUMBERS[:20], '2', '0.5', '-1'))}*"
    return f"{factor}{kind}:{argument}"


def _pattern(rng: random.Random, symbols: list[str], depth: int) -> str:
    """A regular expression, mostly well formed."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice((*symbols, *ATOMS))
    inner = _pattern(rng, symbols, depth - 1)
    ways = (
        inner + _pattern(rng, symbols, depth - 1),
        f"({inner}|{_pattern(rng, symbols, depth - 1)})",
        f"({inner})" + rng.choice(REPEATS),
        f"({inner}){{{rng.choice(COUNTS)}}}",
        f"(?:{inner})",
        "(" * (n := rng.choice((1, 5, 90, 250))) + inner + ")" * n,
    )  # fmt: skip
    return ways[rng.choice((0, 0, 0, 1, 1, 2, 2, 3, 4, 5))]


def attempt(case: Case, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    if case.command:
        flags = [f"--reward={case.expression}", f"--vocab-size={case.vocab_size}"]
        flags += [f"--max-length={case.max_length}", "--top=2"]
        flags += [] if case.eos_id is None else [f"--eos-id={case.eos_id}"]
        flags += [] if case.alphabet is None else [f"--alphabet={case.alphabet}"]
        return judge.command(["solve", *flags], output)
    return judge.call(lambda: solved(case))


def solved(case: Case) -> object:
    """Parse the expression, and solve what it pays."""
    space = rl_ebm.TokenSpace(case.vocab_size, case.max_length, case.eos_id)
    reward = parse_reward(case.expression, space, case.alphabet)
    return summarise(rl_ebm.solve(rl_ebm.EBM(space, reward)), 2)
