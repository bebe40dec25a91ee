"""The README's report, and its picture: learned against exact logits, where the policy errs.

    OMP_NUM_THREADS=1 python -m benchmarks.readme.picture runs/demo    # of the demo's run

Writes ``benchmarks/results/demo.png`` and ``demo.txt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

import rl_ebm
from rl_ebm.training.pictures import error_figure
from rl_ebm.verification.verify import logit_errors


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    out: Path = Path(__file__).parents[1] / "results"
    """folder of both"""


def main(options: Options) -> None:
    policy, ebm = rl_ebm.load(options.run)
    solution = rl_ebm.solve(ebm)
    options.out.mkdir(parents=True, exist_ok=True)
    error_figure(logit_errors(policy, solution)).savefig(options.out / "demo.png", dpi=110)
    (options.out / "demo.txt").write_text(f"{rl_ebm.verify(policy, solution)}\n")
    print(options.out / "demo.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
