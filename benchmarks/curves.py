"""Exact KL against seconds, for every agent on the task ``random`` (A = 8, T = 4), 3 seeds.

    python -m benchmarks.curves            # all runs, two at a time: about 7 minutes on 2 cores
    python -m benchmarks.curves --quick    # a second each: only to see that it works

Writes ``benchmarks/results/curves.csv``, ``curves.md`` (the README's table) and ``curves.png``.
"""

from __future__ import annotations

import csv
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from matplotlib.figure import Figure

import rl_ebm
from benchmarks.machine import describe, interval
from rl_ebm.envs import make_task

RESULTS = Path(__file__).parent / "results"
BUDGET = {"exact": 30.0, "teacher-forcing": 60.0, "soft-q": 60.0, "policy-gradient": 120.0}


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    seeds: int = 3
    """runs of each agent"""
    workers: int = 2
    """runs at a time"""
    quick: bool = False
    """a second for each run; writes nothing into the results"""


def run(agent: str, seed: int, seconds: float) -> list[dict[str, float | str | int]]:
    """One run with default settings; its exact metrics, by trained seconds."""
    with TemporaryDirectory() as folder:
        rl_ebm.train(make_task("random"), agent, folder, seconds=seconds, seed=seed)
        with open(Path(folder) / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["exact/kl_policy_target"]]
    return [
        {
            "agent": agent,
            "seed": seed,
            "seconds": float(row["seconds"]),
            "step": int(row["step"]),
            "reward_calls": int(row["reward_calls"]),
            "kl_policy_target": float(row["exact/kl_policy_target"]),
            "kl_target_policy": float(row["exact/kl_target_policy"]),
            "tv": float(row["exact/tv"]),
        }
        for row in rows
    ]


def table(rows: list[dict[str, float | str | int]]) -> str:
    """Markdown: what each agent ends at, mean and 95% interval over the seeds."""
    lines = [
        "| agent | seconds | steps | KL(target, policy) | KL(policy, target) | total variation |",
        "|---|---|---|---|---|---|",
    ]
    for agent in BUDGET:
        ends = []
        for seed in sorted({int(r["seed"]) for r in rows if r["agent"] == agent}):
            ends.append([r for r in rows if r["agent"] == agent and r["seed"] == seed][-1])
        if not ends:
            continue
        cells = [
            interval([float(end[key]) for end in ends])
            for key in ("kl_target_policy", "kl_policy_target", "tv")
        ]
        steps = statistics.median(int(end["step"]) for end in ends)
        lines.append(f"| `{agent}` | {BUDGET[agent]:.0f} | {steps:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, float | str | int]]) -> Figure:
    """KL(policy, target) against seconds, a line for each seed."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, agent in enumerate(BUDGET):
        for seed in sorted({int(r["seed"]) for r in rows if r["agent"] == agent}):
            line = [r for r in rows if r["agent"] == agent and r["seed"] == seed]
            axes.plot(
                [float(r["seconds"]) for r in line],
                [max(float(r["kl_policy_target"]), 1e-9) for r in line],
                color=f"C{colour}",
                label=agent if seed == 0 else None,
                linewidth=1.2,
            )
    axes.set(
        yscale="log",
        xlabel="trained seconds",
        ylabel="exact KL(policy, target) (nats)",
        title="Task random: 4,096 sequences, default settings, one line for each seed",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(options: Options) -> None:
    rows: list[dict[str, float | str | int]] = []
    jobs = [(agent, seed) for agent in BUDGET for seed in range(options.seeds)]
    # The longest first, so that the last ones end together.
    jobs.sort(key=lambda job: -BUDGET[job[0]])
    # Each run has a process and a thread of its own.
    torch.set_num_threads(1)
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        seconds = [1.0 if options.quick else BUDGET[agent] for agent, _ in jobs]
        for lines in pool.map(run, *zip(*jobs, strict=True), seconds):
            rows += lines
            print(
                f"{lines[0]['agent']} seed {lines[0]['seed']}: KL(policy, target) "
                f"{lines[-1]['kl_policy_target']:.6f}",
                file=sys.stderr,
            )
    rows.sort(key=lambda row: (list(BUDGET).index(str(row["agent"])), row["seed"]))
    text = f"{table(rows)}\n\n{describe()}\n"
    print(text)
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "curves.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "curves.md").write_text(text)
    picture(rows).savefig(RESULTS / "curves.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
