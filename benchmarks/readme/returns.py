"""Which return should soft Q-learning regress on? The default is chosen by this measurement.

    python -m benchmarks.readme.returns            # 18 runs of 30 s, two at a time: about 5 minutes
    python -m benchmarks.readme.returns --quick    # a second each: only to see that it works

Task ``random``, all else at its default. Writes ``benchmarks/results/returns.csv`` and ``.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.support.machine import describe
from benchmarks.support.runs import Run, end_cells, measure_all, write_csv
from rl_ebm.agents import SoftQConfig

RESULTS = Path(__file__).parents[1] / "results"
RETURNS = {
    "`lam=1` (default): whole paths": SoftQConfig(),
    "`lam=0.9`": SoftQConfig(lam=0.9),
    "`lam=0.5`": SoftQConfig(lam=0.5),
    "`n_step=2`": SoftQConfig(n_step=2),
    "`lam=0`: one step": SoftQConfig(lam=0.0),
    "`lam=0, tau=0.05`: one step, slow target": SoftQConfig(lam=0.0, tau=0.05),
}


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    seeds: int = 3
    """runs of each return"""
    seconds: float = 30.0
    """of training"""
    workers: int = 2
    """runs at a time"""
    quick: bool = False
    """a second for each run; writes nothing into the results"""


def main(options: Options) -> None:
    seconds = 1.0 if options.quick else options.seconds
    runs = [
        Run(name, "soft-q", seed, seconds, config)
        for name, config in RETURNS.items()
        for seed in range(options.seeds)
    ]
    rows = measure_all(runs, options.workers)
    lines = [
        "| return | steps | KL(target, policy) | KL(policy, target) | total variation |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {end_cells(rows, name)} |" for name in RETURNS]
    text = "\n".join(lines) + f"\n\n{seconds:.0f} s for each run. {describe()}\n"
    print(text)
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / "returns.csv", rows)
    (RESULTS / "returns.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
