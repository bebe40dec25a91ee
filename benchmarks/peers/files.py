"""The results on disk: rows as CSV, who was not run and why, tables, pictures, the README."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.peers.contender import Contender
from benchmarks.peers.crossings import KL
from benchmarks.peers.processes import Run
from benchmarks.peers.report import INTRO, settings
from benchmarks.peers.watch import Rows
from rl_ebm.studies.bench_rows import SAMPLES, bracket, samples_of, write_rows
from rl_ebm.studies.seeds import between
from rl_ebm.training.checkpoint import write_text

NOTES = "not_run.json"
WHY = "why.md"
"""written by hand: who wins, and why"""
TEXTS = ("task", "contender", "version")
WHOLE = ("seed", "threads", "parameters", "updates", "reward_calls", SAMPLES)


def read_rows(path: Path) -> Rows:
    """The rows of a CSV file, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: _value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _value(column: str, text: str) -> Any:
    if column in TEXTS:
        return text
    return int(text) if column in WHOLE else float(text)


class Results:
    """What is known of one task.

    Args:
        folder: of all results; made where there is none.
        task: its name.
    """

    def __init__(self, folder: Path, task: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.task = folder, task
        self.rows = read_rows(self._path("csv"))
        everything = _read_notes(folder)
        self.notes: dict[str, str] = everything.get(task, {})

    def has(self, contender: str, seed: int, limit: float) -> bool:
        """Whether this run's rows are there."""
        return any(
            (row["contender"], row["seed"], row["limit"]) == (contender, seed, limit)
            for row in self.rows
        )

    def threads(self, contender: str) -> int | None:
        """On how many threads its runs were; None where there is none."""
        return next((r["threads"] for r in self.rows if r["contender"] == contender), None)

    def add(self, run: Run, limit: float, found: dict[str, Any]) -> None:
        """The rows of a run, in place of those of the same contender and seed; written at once."""
        contender, seed = run.contender, run.seed
        self.rows = [r for r in self.rows if (r["contender"], r["seed"]) != (contender, seed)]
        fixed = {
            "task": self.task,
            "contender": contender,
            "version": found["version"],
            "parameters": found["parameters"],
            "seed": seed,
            "threads": run.threads,
            "limit": limit,
        }
        self.rows += [fixed | row for row in found["rows"]]
        write_rows(self._path("csv"), self.rows)
        if self.notes.pop(contender, None) is not None:
            self._write_notes()

    def note(self, contender: str, why: str) -> None:
        """Why a contender has no rows."""
        self.notes[contender] = why
        self._write_notes()

    def last(self, contender: str) -> str:
        """One line on where a contender is."""
        if contender in self.notes:
            return f"{contender}: {self.notes[contender]}"
        row = [row for row in self.rows if row["contender"] == contender][-1]
        kl = f"{row[KL]:.3g}"
        if samples_of([row]) is not None:
            kl = between(*bracket(row, KL), row[KL])
        return (
            f"{contender}: KL(policy, target) {kl} after "
            f"{row['seconds']:.0f} s, {row['updates']:,} updates"
        )

    def write(self, text: str, figure: Figure) -> None:
        """The table and the picture."""
        write_text(self._path("md"), text)
        figure.savefig(self._path("png"), dpi=110)

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.task}.{ending}"

    def _write_notes(self) -> None:
        everything = _read_notes(self.folder) | {self.task: self.notes}
        write_text(self.folder / NOTES, json.dumps(everything, indent=1) + "\n")


def _read_notes(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / NOTES
    found: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def assemble(folder: Path, contenders: list[Contender], shown_from: str) -> str:
    """The section's README from what a folder holds.

    Args:
        shown_from: path from the README to the folder, for its pictures.
    """
    parts = [INTRO]
    rows: Rows = []
    for path in sorted(folder.glob("*.csv"), key=lambda p: (p.stem != "random", p.stem)):
        found = read_rows(path)
        table = path.with_suffix(".md")
        if not found or not table.exists():
            continue
        rows += found
        picture = f"![KL against seconds]({shown_from}{path.stem}.png)"
        parts.append(f"## Task {path.stem}\n\n{table.read_text().strip()}\n\n{picture}\n")
    if (folder / WHY).exists():
        parts.append((folder / WHY).read_text().strip() + "\n")
    parts.append(f"## Settings and fixed points\n\n{settings(rows, contenders)}\n")
    return "\n".join(parts)
