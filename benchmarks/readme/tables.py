"""One agent of each kind on a real reward table: exact KLs, TV, largest logit error by depth.

    python -m benchmarks.readme.tables six6_ref_r1.tsv --seconds 300
    python -m benchmarks.readme.tables potts                         # or phrases: a named task

The table is one that you have (see the README for the format); it is min-max scaled, and beta
is 0.1 (of a task 1). Of a task beyond enumeration each figure has its interval, logit errors are
those of visited states, and ``exact``, which lists every prefix, is left out. Writes
``benchmarks/results/table_NAME.md`` and ``.csv``.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rl_ebm
from benchmarks.support.machine import describe
from benchmarks.support.runs import FOUR
from rl_ebm.envs import TASKS, make_task
from rl_ebm.rewards import read_table
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies.seeds import between
from rl_ebm.training.loop import looks_at_all

RESULTS = Path(__file__).parents[1] / "results"
SAMPLED = (
    " over seeds; KLs and TV are estimates from {:,} exact samples of target and policy each, in "
    "brackets their 95% intervals of sampling"
)


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    table: tyro.conf.Positional[Path]
    """a TSV or CSV file with the columns sequence and score, or the name of a task"""
    seconds: float = 300.0
    """of training, for each agent"""
    beta: float | None = None
    """temperature; None for 0.1 with a table, 1 with a task"""
    samples: int = 1000
    """responses of target and policy each of a verification beyond enumeration"""
    seed: int = 0
    """of the initial weights and the draws"""
    dry: bool = False
    """print only: write nothing into the results"""


def problem(options: Options) -> tuple[rl_ebm.EBM, str]:
    """The EBM, and a word on where its rewards are from."""
    name = str(options.table)
    if name in TASKS:
        return make_task(name, beta=options.beta or 1.0), "a named task"
    table = read_table(options.table, normalise="minmax")
    return rl_ebm.EBM(table.space, table.scores, options.beta or 0.1), "min-max scaled"


def cell(x: float | Interval) -> float | str:
    """A figure; one that is estimated with its interval, as text."""
    return between(x.low, x.high, x.estimate) if isinstance(x, Interval) else x


def main(options: Options) -> None:
    torch.set_num_threads(2)
    ebm, told = problem(options)
    listed = looks_at_all(ebm)
    config = rl_ebm.TrainConfig(seconds=options.seconds, samples=options.samples)
    rows = []
    for name in FOUR if listed else [name for name in FOUR if name != "exact"]:
        _, report = rl_ebm.train(ebm, name, config=config, seed=options.seed)
        assert report is not None
        row = {
            "agent": name,
            "KL(target, policy)": cell(report.kl_target_policy),
            "KL(policy, target)": cell(report.kl_policy_target),
            "TV": cell(report.tv),
        }
        linf = "linf" if listed else "linf visited"
        row |= {f"{linf}, depth {d.depth}": d.linf for d in report.per_depth}
        rows.append(row)
        print(f"{name}: {row}", file=sys.stderr)
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [x if isinstance(x, str) else f"{x:.2g}" for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + (
        f"\n\n`{options.table.name}`, {told}, beta {ebm.beta}, {options.seconds:.0f} s "
        f"for each agent, seed {options.seed}, default settings: one run each, so no interval"
        + ("" if listed else SAMPLED.format(options.samples))
        + f". {describe()}\n"
    )
    print(text)
    if options.dry:
        return
    RESULTS.mkdir(exist_ok=True)
    name = options.table.stem.split("_")[0]
    (RESULTS / f"table_{name}.md").write_text(text)
    with open(RESULTS / f"table_{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
