"""One run in a process of its own, by whichever interpreter has the library.

    python -m benchmarks.peers.worker --contender "rl-ebm soft-q" --task random --out run.json

Writes what the stopwatch saw as JSON. Exit code 3: the library is not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.peers.entries import CONTENDERS
from benchmarks.peers.watch import DRAWN, TimeUp, Watch
from rl_ebm import solve
from rl_ebm.studies.bench import Problem

NOT_INSTALLED = 3


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    contender: str
    """the name of one contender"""
    out: Path
    """the JSON file to write"""
    task: str = "random"
    """a named task, or the path of a table"""
    beta: float = 1.0
    """temperature"""
    seed: int = 0
    """of the initial weights and the draws"""
    seconds: float = 180.0
    """of training, where the contender has no shorter limit"""
    looks: int = 50
    """about how many verifications"""
    threads: int = 2
    """processor cores"""
    samples: int = DRAWN
    """responses of target and policy each of a verification beyond enumeration"""


def limit_threads(threads: int, by_cores: bool) -> None:
    """So many threads; where the library has no switch for it, so many cores."""
    torch.set_num_threads(threads)
    if by_cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def main(options: Options) -> int:
    contender = CONTENDERS[options.contender]
    if not contender.installed:
        print(contender.how_to_install, file=sys.stderr)
        return NOT_INSTALLED
    limit_threads(options.threads, by_cores=contender.spreads)
    ebm, _ = Problem(options.task, options.beta).make()
    limit = contender.seconds(options.seconds)
    watch = Watch(solve(ebm), limit, options.looks, samples=options.samples)
    torch.manual_seed(options.seed)
    with contextlib.suppress(TimeUp):
        contender.train(ebm, options.seed, watch)
    found = {
        "version": contender.version,
        "parameters": watch.parameters,
        "rows": watch.rows,
    }
    options.out.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
