"""Every public function, constructor and method with values of wrong types, shapes and sizes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

import rl_ebm
from rl_ebm.agents import AGENTS

from . import damage, judge
from .subjects import NAMES, Subject, subjects

COUNT = 2000
VALUES = (
    "None", "True", "-1", "0", "1", "2.5", "float('nan')", "float('inf')", "-float('inf')",
    "1e308", "1j",
    "''", "'x'", "'\\ud800'", "'a' * 5000", "b'x'", "[]", "[1]", "[[]]", "[None]", "['a']",
    "[-1]", "()",
    "{}", "{'a': 1}", "object()", "len", "int", "lambda *args: None", "lambda *args: 'x'",
    "torch",
    "np.int64(3)", "np.float32('nan')", "np.zeros(3)", "np.array([[1.0]])", "np.array(['a'])",
    "range(3)", "iter([])", "Path('/proc/nothing')", "'/proc/nothing'", "torch.device('cuda')",
    "torch.zeros(0)", "torch.zeros(())", "torch.tensor(3)", "torch.zeros(2, 3)",
    "torch.zeros(2, 3, 4)",
    "torch.full((2, 3), float('nan'))", "torch.zeros(2, 3, dtype=torch.int64)", "torch.zeros(3)",
    "-torch.ones(2, 3, dtype=torch.int64)", "torch.full((2,), 2**62)", "torch.zeros(27).half()",
    "torch.zeros(2, 3, dtype=torch.complex64)", "torch.zeros(2, 3, dtype=torch.bool)",
    "torch.zeros(2, 3).to_sparse()", "torch.empty(2, 3, device='meta')", "torch.float16",
    "torch.full((27,), float('inf'))", "torch.full((27,), -float('inf'))",
    "torch.nn.Linear(2, 2)",
    "space", "eos", "two", "ebm", "solution", "tabular", "batch", "rl_ebm.TokenSpace",
    "Exception()",
)  # fmt: skip
LARGE = ("10**9", "2**31", "2**63", "10**30", "-10**30", "np.int64(2**62)")
# A large number of these is no slip: it is a long time, or as many calls of the policy.
LONG = {"steps", "seconds", "samples", "particles", "iterations", "config", "options", "every"}


@dataclass(frozen=True)
class Case:
    """A call, as source; its names are those of ``subjects.NAMES``."""

    source: str


def case(seed: int) -> Case:
    """A negative seed is a right call: nothing is wrong with it yet."""
    rng, known = random.Random(f"calls {seed}"), subjects()
    if seed < 0:
        return written(known[-1 - seed], right(known[-1 - seed]))
    return spoilt(rng, known[seed % len(known)])


def right(subject: Subject) -> dict[str, str]:
    """Arguments with which a call succeeds, and soon."""
    given = dict(subject.required)
    if subject.label in ("train", "resume"):
        given |= {"steps": "1"}
    if subject.label == "train":
        given |= {"network": "small", "options": "rl_ebm.agents.SoftQConfig(batch_size=8)"}
    if subject.label == "TrainConfig":
        given |= {"steps": "1"}
    if subject.label in ("TokenMDP", "TokenVectorEnv"):
        given |= {"ebm": "ebm"}
    if "teacher" in subject.parameters:
        given |= {"teacher": "solution"}
    return given


def written(subject: Subject, given: dict[str, str]) -> Case:
    arguments = ", ".join(f"{name}={value}" for name, value in given.items())
    return Case(f"{subject.source}({arguments})")


def spoilt(rng: random.Random, subject: Subject) -> Case:
    """A right call, with one or two of its arguments wrong."""
    given = right(subject)
    chosen = rng.sample(subject.parameters, min(len(subject.parameters), rng.choice((1, 1, 1, 2))))
    for name in chosen:
        given[name] = rng.choice(VALUES if name in LONG else (*VALUES, *LARGE))
    return written(subject, given)


prepare = damage.prepare


def decoded(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same, which joins its pieces without a blank."""
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


class Names(dict[str, Any]):
    """Values of names, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.world = {"torch": torch, "np": np, "rl_ebm": rl_ebm, "Path": Path, "folder": folder}
        self.world |= {"tokenizers": tokenizers, "decoded": decoded}
        super().__init__()

    def __missing__(self, name: str) -> Any:
        if name not in NAMES:
            raise KeyError(name)
        self[name] = eval(NAMES[name], self.world, self)
        return self[name]


def attempt(case: Case, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    torch.manual_seed(0)
    before, known = Path.cwd(), dict(AGENTS)
    os.chdir(folder)
    try:
        damage.place_run("dpg", folder / "run")
        (folder / "table.tsv").write_text("sequence\tscore\naa\t1\nab\t2\nba\t0\nbb\t-1\n")
        (folder / "pairs.jsonl").write_text('{"chosen": [0, 1, 2], "rejected": [2, 2, 2]}')
        names = Names(folder)
        return judge.call(lambda: eval(case.source, names.world, names))
    finally:
        os.chdir(before)
        AGENTS.clear()  # register() makes names that stay
        AGENTS.update(known)
