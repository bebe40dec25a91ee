"""Table files: good ones with faults in their cells, rows, bytes and paths, and wrong arguments."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rl_ebm.rewards import read_table

from . import judge
from .mutate import NUMBERS, TEXTS, spoil, spoil_bytes

COUNT = 3000
# No FIFO: what a shell writes into one by <(...) is read as any file.
SPECIAL = ("missing", "folder", "zeros", "loop", "empty")


@dataclass(frozen=True)
class Case:
    """A file (or what stands in its place), and what is said to who reads it."""

    name: str
    data: bytes
    special: str | None
    arguments: dict[str, str]
    command: bool


def case(seed: int) -> Case:
    rng = random.Random(f"tables {seed}")
    integers = rng.random() < 0.4
    symbols = rng.sample(("0", "1", "2", "12", "-3"), 3) if integers else rng.sample("abcGT01é", 3)
    symbols = symbols[: rng.choice((2, 2, 3))]
    length = rng.randrange(1, 4)
    delimiter = rng.choice("\t,")
    rows = [
        [(" " if integers else "").join(y), f"{rng.gauss(0, 3):.4g}"]
        for y in product(symbols, repeat=length)
    ]
    header = ["sequence", "score"]
    if rng.random() < 0.2:
        header, rows = [*header, "note"], [[*row, "x"] for row in rows]
    if rng.random() < 0.2:
        header, rows = header[::-1], [row[::-1] for row in rows]
    rng.shuffle(rows)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        _spoil_rows(rng, rows)
    end = rng.choice(("\n", "\n", "\r\n", "\r"))
    text = end.join(delimiter.join(cells) for cells in [header, *rows]) + rng.choice((end, ""))
    text = spoil(rng, text, rng.choice((0, 0, 0, 0, 1, 1, 3)))
    coding = rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1"))
    data = text.encode(coding, "replace")
    if rng.random() < 0.08:
        data = spoil_bytes(rng, data)
    arguments = {}
    if rng.random() < 0.3:
        given = rng.choice((" ".join(symbols), "".join(symbols), " ".join(symbols)[::-1]))
        arguments["alphabet"] = spoil(rng, given, rng.choice((0, 1)))
    if rng.random() < 0.2:
        arguments["normalise"] = rng.choice(("minmax", "minmax", "", *TEXTS[:3]))
    if rng.random() < 0.3:
        arguments["missing"] = rng.choice(("forbid", "forbid", "forbid", "error", "", "Forbid"))
    special = rng.choice(SPECIAL) if rng.random() < 0.02 else None
    name = rng.choice(("t.tsv", "t.csv", "T.CSV", "t", "a b.tsv", "é.tsv"))
    return Case(name, data, special, arguments, rng.random() < 0.3)


def _spoil_rows(rng: random.Random, rows: list[list[str]]) -> None:
    """Leave out, repeat, or change a cell of some rows."""
    way, row = rng.randrange(5), rng.choice(rows)
    if way == 0 and len(rows) > 1:
        rows.remove(row)
    elif way == 1:
        rows.append(list(row))
    elif way == 2:
        row[rng.randrange(len(row))] = rng.choice(NUMBERS)
    elif way == 3:
        row[rng.randrange(len(row))] = rng.choice(TEXTS)
    else:
        at = rng.randrange(len(row))
        row[at] = f'"{row[at]}"' if rng.random() < 0.5 else spoil(rng, row[at], 1)


def place(path: Path, data: bytes, special: str | None) -> None:
    """Write a file, or put what is none where it should be."""
    if special == "folder":
        path.mkdir()
    elif special == "fifo":
        os.mkfifo(path)
    elif special == "zeros":
        path.symlink_to("/dev/zero")
    elif special == "loop":
        path.symlink_to(path)
    elif special != "missing":
        path.write_bytes(b"" if special == "empty" else data)


def attempt(case: Case, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    path = folder / case.name
    place(path, case.data, case.special)
    if not case.command:
        return judge.call(lambda: read_table(path, **case.arguments))
    flags = [f"--{name}={value}" for name, value in case.arguments.items()]
    return judge.command(["solve", "--table", str(path), "--top", "2", *flags], output)
