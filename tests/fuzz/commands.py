"""Command lines: good ones of every command, with words left out, doubled, swapped and spoilt."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from rl_ebm.agents import AGENTS
from rl_ebm.cli import COMMANDS
from rl_ebm.cli import parsing as flags
from rl_ebm.cli.flags import Audit, Bench, Diagnose, Sample, Solve, Train, Verify

from . import damage, judge
from .mutate import NUMBERS, TEXTS, spoil

COUNT = 1000
SMALL = "--task random --vocab-size 3 --max-length 3 --layers 1 --heads 1 --dim 4 --hidden 4"
# What ends a command soon. It stands last, where it wins, but where the limit itself is spoilt.
LIMITS = {
    "train": ["--steps", "1"],
    "diagnose": ["--seconds", "0.1"],
    "bench": ["--calls", "16", "--seconds", "0.1", "--seeds", "1", "--workers", "1"],
    "audit": ["--vocab-size", "2", "--max-length", "2"],
}
TIMES = ("0", "1", "2", "-1", "nan", "-inf", "0.05", "1e-400", "", "x", "1,5", "--1", "None", "½")
LINES = (
    f"train --agent AGENT {SMALL} --out OUT",
    f"train --agent AGENT {SMALL} --out OUT --policy tabular --eos-id 0 --reference uniform",
    "train --agent policy-gradient --batch-size 8 --policy tabular --table TABLE --out OUT",
    "train --agent soft-q --batch-size 8 --policy tabular --reward contains:1 --vocab-size 2 "
    "--max-length 9 --reference ngram:CORPUS?order=2 --out OUT --seed 3 --overwrite",
    "train --resume RUN",
    "train --resume RUN --device cpu",
    "verify RUN",
    "verify RUN --max-kl 10 --samples 5 --seed 1 --confidence 0.9 --memory 9",
    "verify RUN --reward-max 3",
    "solve --task prompts --top 2 --json",
    "solve --task random --vocab-size 3 --max-length 3 --eos-id 1 --beta 0.5 --task-seed 4",
    "solve --table TABLE --beta 0.1 --normalise minmax --alphabet ab --missing forbid",
    "solve --reward 2*contains:ab --alphabet abc --max-length 5 --reference hmm:CORPUS?states=2",
    "sample RUN -n 3 --seed 1 --device cpu",
    "diagnose RUN --json",
    "agents",
    "help",
    "--version",
)
RARE = (
    "audit --task random --beta 0.5 --reference uniform --json",
    "bench --out OUT --agents exact --tasks random --beta 0.5 --layers 1 --heads 1 --dim 4",
    "--help",
    "train --help",
)
KINDS = {
    "train": Train, "verify": Verify, "solve": Solve, "audit": Audit, "diagnose": Diagnose,
    "bench": Bench, "sample": Sample,
}  # fmt: skip
PATHS = (
    "/proc/nothing",
    "/dev/null",
    "/dev/zero",
    "/dev/null/x",
    ".",
    "OUT/a/b/c",
    "TABLE",
    "RUN",
    "x" * 300,
)


@dataclass(frozen=True)
class Case:
    """Words after ``rl-ebm``; RUN, TABLE, CORPUS and OUT stand for paths."""

    words: tuple[str, ...]


@cache
def all_flags() -> tuple[str, ...]:
    kinds = [*KINDS.values(), *(entry.config for entry in AGENTS.values())]
    return tuple(sorted(set().union(*map(flags.flag_names, kinds)) | {"--help", "-n", "-h", "--"}))


def case(seed: int) -> Case:
    rng = random.Random(f"commands {seed}")
    rare = rng.random() < 0.04
    line = rng.choice(RARE if rare else LINES)
    agent = rng.choice(list(AGENTS))
    words = line.replace("AGENT", agent).split()
    small = any(f.name == "batch_size" for f in fields(AGENTS[agent].config))
    if agent in words and small:
        words += ["--batch-size", "8"]
    command = words[0]
    limits = list(LIMITS.get(command, ()))
    if limits and rng.random() < 0.1:
        limits[1] = rng.choice(TIMES)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 5))):
        _spoil_words(rng, words)
    words = [_harmless(word) for word in words]
    # A command that has become another one brings no limits of its own.
    command = next((word for word in words if word in COMMANDS), command)
    limits = limits if command == line.split()[0] else list(LIMITS.get(command, ()))
    return Case((*words, *limits))


def _harmless(word: str) -> str:
    """Nothing is written outside the case's folder; a process cannot be given a NUL."""
    word = word.replace("\0", "")
    value = word.rpartition("=")[2] if word.startswith("-") else word
    return word[: len(word) - len(value)] + "/proc/nothing" if set(value) == {"/"} else word


def _spoil_words(rng: random.Random, words: list[str]) -> None:
    at = rng.randrange(len(words)) if words else 0
    way = rng.randrange(12) if words else 4
    if way == 0:
        del words[at]
    elif way == 1:
        words.insert(at, words[at])
    elif way == 2:
        other = rng.randrange(len(words))
        words[at], words[other] = words[other], words[at]
    elif way == 3:
        words[at] = spoil(rng, words[at], 1)
    elif way in (4, 5):
        words += [rng.choice(all_flags()), rng.choice((*NUMBERS, *TEXTS))]
    elif way == 6:
        words.insert(at, rng.choice((*TEXTS, *PATHS, "\udcff", "@x", "—steps", "-x", "--no-json")))
    elif way == 7 and words[at].startswith("--") and at + 1 < len(words):
        words[at : at + 2] = [f"{words[at]}={words[at + 1]}"]
    else:
        # A value of a flag, most often.
        values = [i for i, word in enumerate(words) if i and not word.startswith("-")]
        place = rng.choice(values or [at])
        words[place] = rng.choice(PATHS if way == 8 else (*NUMBERS, *NUMBERS, *TEXTS))


prepare = damage.prepare


def attempt(case: Case, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    before = Path.cwd()
    os.chdir(folder)
    try:
        run, table, corpus = folder / "run", folder / "table.tsv", folder / "corpus.txt"
        damage.place_run("soft-q", run)
        table.write_text("sequence\tscore\naa\t1\nab\t2\nba\t0\nbb\t-1\n")
        corpus.write_text("0 1 0 1 0 1 0 1 0\n1 1 1 1 1 1 1 1 1\n")
        paths = {"RUN": run, "TABLE": table, "CORPUS": corpus, "OUT": folder / "out"}
        words = list(case.words)
        for name, path in paths.items():
            words = [word.replace(name, str(path)) for word in words]
        return judge.command(words, output)
    finally:
        os.chdir(before)
