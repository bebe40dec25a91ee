"""Exact KL against seconds, for every agent on the task ``random`` (A = 8, T = 4), 3 seeds.

    python -m benchmarks.readme.curves            # two runs at a time: 7 minutes on 2 cores
    python -m benchmarks.readme.curves --quick    # a second each: only to see that it works

Writes ``benchmarks/results/curves.csv``, ``curves.md`` (the README's table) and ``curves.png``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from benchmarks.support.machine import describe
from benchmarks.support.runs import Rows, Run, end_cells, lines_of, measure_all, write_csv

RESULTS = Path(__file__).parents[1] / "results"
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


def table(rows: Rows) -> str:
    """Markdown: what each agent ends at, mean and 95% interval over the seeds."""
    lines = [
        "| agent | seconds | steps | KL(target, policy) | KL(policy, target) | total variation |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {BUDGET[name]:.0f} | {end_cells(rows, name)} |" for name in BUDGET]
    return "\n".join(lines)


def picture(rows: Rows) -> Figure:
    """KL(policy, target) against seconds, a line for each seed."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, agent in enumerate(BUDGET):
        for i, line in enumerate(lines_of(rows, agent)):
            axes.plot(
                [r["seconds"] for r in line],
                [max(r["kl_policy_target"], 1e-9) for r in line],
                color=f"C{colour}",
                label=agent if i == 0 else None,
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
    runs = [
        Run(agent, agent, seed, 1.0 if options.quick else seconds)
        for agent, seconds in BUDGET.items()
        for seed in range(options.seeds)
    ]
    rows = measure_all(runs, options.workers)
    text = f"{table(rows)}\n\n{describe()}\n"
    print(text)
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / "curves.csv", rows)
    (RESULTS / "curves.md").write_text(text)
    picture(rows).savefig(RESULTS / "curves.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
