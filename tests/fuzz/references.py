"""References fitted to files: wrong options, wrong lines, wrong bytes, and what is no file."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rl_ebm
from rl_ebm.policies.expression import parse_reference

from . import judge
from .mutate import NUMBERS, spoil, spoil_bytes
from .tables import SPECIAL, place

COUNT = 1000
# Whoever asks for a million iterations gets them: only numbers that no machine lives to end.
ENDLESS = ("9223372036854775807", "9223372036854775808", "9" * 30)
STATES = ("0", "1", "2", "3", "-1", "99999999999", "9" * 30, "nan", "1e9", "4294967296", "1.5", "")


@dataclass(frozen=True)
class Case:
    """A reference as it is written, with FILE for the path of the file."""

    expression: str
    data: bytes
    special: str | None
    eos_id: int | None
    alphabet: str | None
    command: bool


def case(seed: int) -> Case:
    rng = random.Random(f"references {seed}")
    eos = rng.choice((None, 0, 2))
    alphabet = rng.choice((None, None, "abc", "a b", "é01"))
    usable = [i for i in range(3) if i != eos]
    lines = []
    for _ in range(rng.randrange(1, 6)):
        length = 3 if eos is None else rng.randrange(3)
        row = [rng.choice(usable) for _ in range(length)]
        lines.append(
            " ".join(map(str, row)) if alphabet is None else "".join(alphabet[i] for i in row)
        )
    text = rng.choice(("\n", "\n", "\r\n")).join([*lines, ""])
    data = spoil(rng, text, rng.choice((0, 0, 0, 1, 2))).encode("utf-8", "replace")
    if rng.random() < 0.1:
        data = spoil_bytes(rng, data)
    special = rng.choice(SPECIAL) if rng.random() < 0.04 else None
    return Case(_expression(rng), data, special, eos, alphabet, rng.random() < 0.3)


def _expression(rng: random.Random) -> str:
    if rng.random() < 0.05:
        return spoil(rng, "uniform", rng.choice((0, 1)))
    kind = rng.choice(("ngram", "hmm"))
    options = {
        "order": rng.choice(("1", "2", "3", "4", *NUMBERS)),
        "smoothing": rng.choice(("1", "0.5", "0", *NUMBERS)),
    }
    if kind == "hmm":
        options = {
            "states": rng.choice(("2", "3", *STATES)),
            "iterations": rng.choice(("2", "2", "0", "1", "-1", "nan", "2.5", *ENDLESS)),
            "smoothing": options["smoothing"],
            "seed": rng.choice(("0", "1", *NUMBERS)),
        }
    given = [f"{k}={v}" for k, v in options.items() if rng.random() < 0.6]
    if kind == "hmm" and not any(x.startswith("iterations") for x in given):
        given.append("iterations=2")
    rng.shuffle(given)
    text = f"{kind}:FILE" + ("?" + "&".join(given) if given else "")
    if rng.random() < 0.3:
        # Digits would be changed as well, into numbers that take their time.
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(("?", "&", "=", ":", " ", "%", "", "\t", "é")) + text[at:]
    return text if rng.random() < 0.95 else text.replace("FILE", rng.choice(("", "/", "FILE/FILE")))


def attempt(case: Case, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    path = folder / "corpus.txt"
    place(path, case.data, case.special)
    expression = case.expression.replace("FILE", str(path))
    if case.command:
        flags = ["--reward=contains:1", "--vocab-size=3", "--max-length=3", "--top=2"]
        flags += [f"--reference={expression}"]
        flags += [] if case.eos_id is None else [f"--eos-id={case.eos_id}"]
        flags += [] if case.alphabet is None else [f"--alphabet={case.alphabet}"]
        if case.alphabet is not None:
            flags[0] = f"--reward=contains:{case.alphabet[1]}"
        return judge.command(["solve", *flags], output)
    space = rl_ebm.TokenSpace(3, 3, case.eos_id)
    return judge.call(lambda: solved(expression, space, case.alphabet))


def solved(expression: str, space: rl_ebm.TokenSpace, alphabet: str | None) -> object:
    """Read the reference, and solve an EBM with it."""
    reference = parse_reference(expression, space, alphabet)
    reward = rl_ebm.rewards.Automaton.contains(space, [1])
    return rl_ebm.solve(rl_ebm.EBM(space, reward, 1.0, reference))
