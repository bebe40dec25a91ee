"""Many runs on the task ``random``, each a process with a thread of its own."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Any

import torch

import rl_ebm
from rl_ebm.envs import make_task
from rl_ebm.studies.bench_rows import bracket
from rl_ebm.studies.seeds import interval

Rows = list[dict[str, Any]]
FOUR = ("soft-q", "policy-gradient", "teacher-forcing", "exact")
"""one agent of each kind: those of the README's tables"""
FIGURES = ("kl_target_policy", "kl_policy_target", "tv")


def geometric_bracket(looks: Rows, key: str, least: float) -> tuple[float, float]:
    """Between what the geometric mean over these very runs is, where each run's interval holds.

    Args:
        looks: one of each run.
        least: what a value counts as where it is smaller.
    """
    low, high = zip(*(bracket(row, key) for row in looks), strict=True)
    return geometric_mean(max(x, least) for x in low), geometric_mean(max(x, least) for x in high)


@dataclass(frozen=True)
class Run:
    """One run: ``name`` is what the table calls it."""

    name: str
    agent: str
    seed: int
    seconds: float
    options: Any = None
    """the agent's config; None for its default"""


def measure(run: Run) -> Rows:
    """The exact metrics of one run with the default network, by trained seconds."""
    task = make_task("random")
    with TemporaryDirectory() as folder:
        rl_ebm.train(
            task, run.agent, folder, options=run.options, seconds=run.seconds, seed=run.seed
        )
        with open(Path(folder) / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["exact/kl_policy_target"]]
    return [
        {
            "name": run.name,
            "seed": run.seed,
            "seconds": float(row["seconds"]),
            "step": int(row["step"]),
            "reward_calls": int(row["reward_calls"]),
            **{key: float(row[f"exact/{key}"]) for key in FIGURES},
        }
        for row in rows
    ]


def measure_all(runs: Sequence[Run], workers: int) -> Rows:
    """All of them, ``workers`` at a time; rows in the order of ``runs``."""
    # The longest first, so that the last ones end together.
    order = sorted(range(len(runs)), key=lambda i: -runs[i].seconds)
    torch.set_num_threads(1)
    found: dict[int, Rows] = {}
    with ProcessPoolExecutor(
        workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as processes:
        for i, rows in zip(order, processes.map(measure, [runs[i] for i in order]), strict=True):
            found[i] = rows
            end = rows[-1]
            print(
                f"{end['name']}, seed {end['seed']}: {end['step']} steps, "
                f"KL(policy, target) {end['kl_policy_target']:.6f}",
                file=sys.stderr,
            )
    return [row for i in range(len(runs)) for row in found[i]]


def lines_of(rows: Rows, name: str) -> list[Rows]:
    """The rows of each seed of one name."""
    seeds = sorted({row["seed"] for row in rows if row["name"] == name})
    return [[r for r in rows if r["name"] == name and r["seed"] == seed] for seed in seeds]


def end_cells(rows: Rows, name: str) -> str:
    """Table cells of where the runs of a name end: steps, then mean and 95% interval of each."""
    ends = [line[-1] for line in lines_of(rows, name)]
    steps = statistics.median(end["step"] for end in ends)
    cells = [interval([end[key] for end in ends]) for key in FIGURES]
    return " | ".join([f"{steps:,.0f}", *cells])


def write_csv(path: Path, rows: Rows) -> None:
    """All rows, the keys of the first as the header."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
