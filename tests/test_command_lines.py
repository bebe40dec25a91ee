"""Command lines of every kind: success or one sentence, in seconds and in little memory."""

from __future__ import annotations

import random
from pathlib import Path

import damage
import pytest
from run_cases import NETWORK_FLAGS

from rl_ebm.agents import AGENTS
from rl_ebm.cli import main

NUMBERS = [
    "-1", "0", "1", "2", "3", "4", "7", "1e3", "2.5", "", " ", "nan", "inf", "-inf", "1e308",
    "1e-320", "x", "0x10", "1_0", "٣", "2147483648", "4294967296", "9223372036854775807",
    "9223372036854775808", "-9223372036854775809", "1000000000", "9" * 30, "9" * 5000,
]  # fmt: skip
PATHS = ["RUN", "TABLE", "FOLDER", "nothing", "", ".", "/", "/dev/null", "/dev/zero", "FIFO",
         "a\0b", "x" * 300, "TABLE/under", "LINK"]  # fmt: skip
WORDS = ["uniform", "random", "star", "randon", "soft-q", "rloo", "cpu", "cuda", "tpu", "ACGT",
         "01", "--", "-h", "automaton", "2*contains:0", "avoids:", "regex:(", "hmm:TABLE?states=2",
         "ngram:nothing", "minmax", "forbid", "é", "\ud800"]  # fmt: skip
TARGET = [
    "--task",
    "--table",
    "--reward",
    "--alphabet",
    "--normalise",
    "--missing",
    "--vocab-size",
    "--max-length",
    "--eos-id",
    "--beta",
    "--reference",
    "--task-seed",
]
FLAGS = {
    "train": [*TARGET, "--agent", "--steps", "--seconds", "--seed", "--device", "--policy",
              "--log-every", "--eval-every", "--checkpoint-every", "--layers", "--heads", "--dim",
              "--hidden", "--resume", "--batch-size", "--lr", "--replay-size", "--n-step"],
    "solve": [*TARGET, "--top", "--device", "--json"],
    "audit": [*TARGET, "--json"],
    "verify": ["--max-kl", "--memory", "--samples", "--confidence", "--reward-max", "--seed"],
    "sample": ["-n", "--n", "--seed", "--device"],
    "diagnose": ["--json", "--second"],
    "bench": ["--agents", "--tasks", "--seeds", "--calls", "--seconds", "--beta", "--options",
              "--task-seed", "--layers"],
    "agents": ["--all"],
}  # fmt: skip
SMALL = ["--vocab-size", "3", "--max-length", "3"]


def command_line(rng: random.Random, out: Path) -> list[str]:
    """A command with up to four flags that are seldom right."""
    command = rng.choice(list(FLAGS))
    args = [command]
    if command == "train":
        agent = ["--agent", rng.choice(list(AGENTS))] if rng.random() < 0.7 else []
        args += [*agent, *NETWORK_FLAGS, "--steps", "1", "--out", str(out)]
    if command == "bench":
        args += ["--out", str(out), "--calls", "4096", "--seeds", "1", "--tasks", "nothing"]
    if command == "audit" or (command in ("train", "solve") and rng.random() < 0.7):
        args += SMALL
    if command in ("verify", "sample", "diagnose"):
        args.append(rng.choice(PATHS) if rng.random() < 0.3 else "RUN")
    if command == "diagnose":
        args += ["--seconds", "0.1"]  # what is asked for in seconds is given
    for _ in range(rng.randrange(1, 4)):
        flag = rng.choice(FLAGS[command])
        value = rng.choice(rng.choice([NUMBERS, PATHS, WORDS, NUMBERS]))
        if command == "sample" and value.isdecimal() and 10**6 < int(value[:30]) < 2**63:
            continue  # as many lines as that, until nobody reads them
        args += [f"{flag}={value}"] if rng.random() < 0.3 else [flag, value]
    if rng.random() < 0.1:
        args.insert(rng.randrange(len(args)), rng.choice([*WORDS, "--bogus", "-x", ""]))
    return args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, a table, a link and so on, under the names of ``PATHS``."""
    folder = tmp_path_factory.mktemp("lines")
    args = ["train", "--agent", "exact", *SMALL, *NETWORK_FLAGS, "--steps", "1"]
    assert main([*args, "--out", str(folder / "RUN")]) == 0
    (folder / "TABLE").write_text("sequence\tscore\n00\t1\n01\t2\n10\t0\n11\t-1\n")
    (folder / "FOLDER").mkdir()
    (folder / "LINK").symlink_to("nothing")
    return folder


def one_case(folder: Path, seed: int) -> str | None:
    args = command_line(random.Random(seed), folder / "out")
    result = damage.run_limited(args, folder / "log")
    fault = result.fault() if result.code != 1 or args[0] != "verify" else None
    return fault and f"seed {seed}, {[x[:40] for x in args]}: {fault}"


@pytest.mark.slow
def test_command_lines(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [fault for seed in range(2000) if (fault := one_case(folder, seed))] == []


def test_some_command_lines(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [fault for seed in range(5000, 5030) if (fault := one_case(folder, seed))] == []
