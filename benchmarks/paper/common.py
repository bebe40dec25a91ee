"""What the scripts share: flags, runs that are not repeated, and the report made of them."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.answers import ANSWERS
from benchmarks.support.machine import describe
from rl_ebm.training.checkpoint import write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Rows = list[dict[str, Any]]

SECTIONS = (
    "function_space",
    "figures",
    "harder_data",
    "bounds",
    "scale",
    "weights",
    "samples",
    "traces",
    "sampled_ebm",
)
"""the scripts, in the order of the report"""
ANSWERED = "**In one line:**"


@dataclass(frozen=True)
class Options:
    """Flags of every script."""

    quick: bool = False
    """small and short, only to see that it works; written to runs/paper-quick"""
    seeds: int = 3
    """runs of each setting"""
    workers: int = 2
    """runs at a time, each with one thread"""
    fresh: bool = False
    """run again what the results hold already"""
    minutes: float | None = None
    """after which no further run is started; what is there is kept"""
    out: Path | None = None
    """where results and report go; None for benchmarks/paper, or runs/paper-quick"""

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        return ROOT / "runs" / "paper-quick" if self.quick else HERE


def collect(
    name: str,
    jobs: Sequence[Any],
    measure: Callable[[Any], Rows],
    options: Options,
    partial: bool = False,
) -> Rows:
    """Rows of every job, from the results where they are there already, else by running it.

    The CSV is written after each job, so that what was stopped goes on where it was.

    Args:
        jobs: frozen dataclasses; their fields become columns.
        measure: a module-level function of a job; runs in a process of its own.
        partial: whether rows of some jobs only will do, when ``options.minutes`` are over.
    """
    path = options.folder / "results" / f"{name}.csv"
    # What belongs to other jobs stays in the file as well: it may have taken hours.
    found = {} if options.fresh else _read(path)
    missing = [job for job in jobs if _key(job) not in found]
    torch.set_num_threads(1)
    commit = _commit()
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as processes:
        running: dict[Future[Rows], Any] = {}
        for i in range(1, len(missing) + 1):
            while missing and len(running) < options.workers and time.monotonic() < end:
                job = missing.pop(0)
                running[processes.submit(measure, job)] = job
            if not running:
                break
            future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            job = running.pop(future)
            fields = {"run": _key(job), **asdict(job)}
            found[_key(job)] = [fields | row | {"commit": commit} for row in future.result()]
            _write(path, [row for rows in found.values() for row in rows])
            print(f"{name}: run {i}, {job}", file=sys.stderr)
    if missing and not partial:
        sys.exit(f"{len(missing)} runs are left: the same command goes on with them")
    # As they are read, so that a first run and a later one see the same values.
    found = _read(path)
    return [row for job in jobs for row in found.get(_key(job), [])]


def measured(name: str, jobs: Sequence[Any], options: Options) -> list[Any]:
    """The jobs whose rows the results hold."""
    known = {} if options.fresh else _read(options.folder / "results" / f"{name}.csv")
    return [job for job in jobs if _key(job) in known]


def publish(name: str, title: str, text: str, figure: Figure, rows: Rows, options: Options) -> None:
    """Write the picture and the section, and make the report of all sections anew."""
    results = options.folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    figure.savefig(results / f"{name}.png", dpi=100)
    commits = sorted({str(row["commit"]) for row in rows})
    seeds = sorted({int(row["seed"]) for row in rows if row.get("seed") not in (None, "")})
    made = (
        f"`python -m benchmarks.paper.{name}`; seeds {', '.join(map(str, seeds))}; commit "
        f"{', '.join(commits)}. {describe()}"
    )
    answer = f"{ANSWERED} {ANSWERS[name](rows)}"
    section = (
        f"## {title}\n\n{answer}\n\n{text.strip()}\n\n![{title}](results/{name}.png)\n\n{made}\n"
    )
    write_text(results / f"{name}.md", section)
    write_text(options.folder / "README.md", report(results))
    print(section)


def report(results: Path) -> str:
    """The introduction, the answers, and all sections that there are."""
    sections = [results / f"{s}.md" for s in SECTIONS]
    intro = (HERE / "intro.md").read_text().strip()
    found = [s.read_text().strip() for s in sections if s.exists()]
    return "\n\n".join([intro, answers(found), *found]) + "\n"


def answers(sections: Sequence[str]) -> str:
    """The line of each section that answers it, as a list."""
    lines = []
    for section in sections:
        title, _, answer = section.split("\n")[:3]
        lines.append(f"- **{title.removeprefix('## ')}.** {answer.removeprefix(ANSWERED).strip()}")
    return "\n".join(lines)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([row(head), "|" + "---|" * len(head), *map(row, lines)])


def select(rows: Rows, **fields: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def ends(rows: Rows, key: str) -> list[float]:
    """The last value of a column in each run."""
    last: dict[str, float] = {}
    for row in rows:
        last[row["run"]] = float(row[key])
    return list(last.values())


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest: for few values on very different scales."""
    if not values:
        return "not run"
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def curve(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    """Median over the runs of y at each x."""
    values: dict[float, list[float]] = {}
    for row in rows:
        values.setdefault(float(row[x]), []).append(float(row[y]))
    xs = sorted(values)
    return xs, [statistics.median(values[v]) for v in xs]


def plot_runs(axes: Axes, rows: Rows, x: str, y: str, label: str, **style: Any) -> None:
    """A line for each run, one label for all."""
    for i, run in enumerate(dict.fromkeys(row["run"] for row in rows)):
        line = select(rows, run=run)
        xs, ys = ([float(row[key]) for row in line] for key in (x, y))
        axes.plot(xs, ys, linewidth=1, label=label if i == 0 else None, **style)


def legend_below(axes: Axes, columns: int, down: float = 0.16) -> None:
    """The legend under the axis: on no curve.

    Args:
        down: of the height of the axes, how far.
    """
    where = (0.5, -down)
    axes.legend(loc="upper center", bbox_to_anchor=where, ncols=columns, fontsize=8, frameon=False)


def _key(job: Any) -> str:
    text = json.dumps([type(job).__name__, asdict(job)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, Rows]:
    if not path.exists():
        return {}
    found: dict[str, Rows] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            # A hexadecimal key can look like a number.
            texts = {name: row[name] for name in ("run", "commit")}
            values = {name: _value(text) for name, text in row.items()}
            found.setdefault(row["run"], []).append(values | texts)
    return found


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
