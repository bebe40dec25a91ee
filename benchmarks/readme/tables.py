"""One agent of each kind on a real reward table: exact KLs, TV, largest logit error by depth.

    python -m benchmarks.readme.tables six6_ref_r1.tsv --seconds 300

The table is one that you have (see the README for the format); it is min-max scaled, and beta
is 0.1. Writes ``benchmarks/results/table_NAME.md`` and ``.csv``.
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
from rl_ebm.rewards import read_table

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    table: tyro.conf.Positional[Path]
    """a TSV or CSV file with the columns sequence and score"""
    seconds: float = 300.0
    """of training, for each agent"""
    beta: float = 0.1
    """temperature"""
    seed: int = 0
    """of the initial weights and the draws"""
    dry: bool = False
    """print only: write nothing into the results"""


def main(options: Options) -> None:
    torch.set_num_threads(2)
    table = read_table(options.table, normalise="minmax")
    ebm = rl_ebm.EBM(table.space, table.scores, options.beta)
    rows = []
    for name in FOUR:
        _, report = rl_ebm.train(ebm, name, seconds=options.seconds, seed=options.seed)
        assert report is not None
        row = {
            "agent": name,
            "KL(target, policy)": report.kl_target_policy,
            "KL(policy, target)": report.kl_policy_target,
            "TV": report.tv,
        }
        row |= {f"linf, depth {d.depth}": d.linf for d in report.per_depth}
        rows.append(row)
        print(f"{name}: {row}", file=sys.stderr)
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [x if isinstance(x, str) else f"{x:.2g}" for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + (
        f"\n\n`{options.table.name}`, min-max scaled, beta {options.beta}, {options.seconds:.0f} s "
        f"for each agent, seed {options.seed}, default settings: one run each, so no interval. "
        f"{describe()}\n"
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
