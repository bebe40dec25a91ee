"""Our methods and other libraries on the same tasks, one process at a time.

    python -m benchmarks.peers                          # all who are installed: hours
    python -m benchmarks.peers --quick                  # a few seconds each; writes no results
    python -m benchmarks.peers --table six6_ref_r1.tsv  # a table of yours as well
    python -m benchmarks.peers --contenders "rl-ebm soft-q" torchgfn
    python -m benchmarks.peers --python torchgfn=PATH gfnx=PATH

A library may live in an environment of its own: ``--python NAME=PATH`` names its interpreter, which
must have this project too. Runs whose rows are there are not repeated. Writes
``benchmarks/peers/results`` and ``benchmarks/peers/README.md``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from benchmarks.peers.entries import find
from benchmarks.peers.files import Results, assemble
from benchmarks.peers.processes import Run, start
from benchmarks.peers.report import picture, remarks, table
from benchmarks.peers.trial import fastest
from benchmarks.peers.watch import DRAWN
from benchmarks.support.machine import describe
from rl_ebm.envs import TASKS
from rl_ebm.messages.words import nearest
from rl_ebm.studies.bench import Problem

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    tasks: tuple[str, ...] = ("random", "pairwise")
    """named tasks; potts and phrases are beyond enumeration, with an interval around each KL"""
    table: Path | None = None
    """a table file to run on as well"""
    beta: float = 1.0
    """temperature of the named tasks"""
    table_beta: float = 0.1
    """temperature of the table, whose scores are scaled to [0, 1]"""
    contenders: tuple[str, ...] = ()
    """names, or beginnings of names; all where none is given"""
    seconds: float = 180.0
    """of training, for each run"""
    seeds: int = 1
    """runs of each"""
    looks: int = 50
    """about how many verifications of each run"""
    samples: int = DRAWN
    """responses of target and policy each of a verification beyond enumeration"""
    threads: int = 2
    """most threads of a run: it has these or one, whichever makes more updates in a trial"""
    python: tuple[str, ...] = ()
    """NAME=PATH: the interpreter that has a library"""
    quick: bool = False
    """three seconds for each run; results go into a temporary folder unless --out is given"""
    out: Path | None = None
    """another folder for the results"""
    interpreters: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("seeds", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")
        for pair in self.python:
            name, equals, path = pair.partition("=")
            if not equals:
                raise ValueError(f"--python takes NAME=PATH, got {pair!r}")
            self.interpreters[name] = path

    @property
    def problems(self) -> list[Problem]:
        """What all are run on.

        Raises:
            ValueError: no such task, or no such file.
        """
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"there is no task {name!r}{nearest(name, TASKS)}")
        if self.table is None:
            return [Problem(name, self.beta) for name in self.tasks]
        if not self.table.exists():
            raise ValueError(f"there is no table {self.table}")
        named = [Problem(name, self.beta) for name in self.tasks]
        return [*named, Problem(str(self.table.resolve()), self.table_beta)]


def machine(threads: int) -> str:
    """On what the workers ran."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    line = describe()
    torch.set_num_threads(before)
    return line


def measure(run: Run, results: Results, interpreter: str, limit: float) -> None:
    """One run into the results: with the threads of its earlier seeds, or those of a trial."""
    threads = results.threads(run.contender) or fastest(run, interpreter)
    if isinstance(threads, str):
        results.note(run.contender, threads)
        return
    run = replace(run, threads=threads)
    found = start(run, interpreter)
    if isinstance(found, str):
        results.note(run.contender, found)
    else:
        results.add(run, limit, found)


def main(options: Options) -> None:
    """All runs, one after the other, and the tables.

    Raises:
        ValueError: a name of no contender, task or file.
    """
    contenders, problems = find(options.contenders), options.problems
    seconds, looks = (3.0, 6) if options.quick else (options.seconds, options.looks)
    folder = options.out or (
        Path(tempfile.mkdtemp(prefix="peers-")) if options.quick else HERE / "results"
    )
    for problem in problems:
        results, (ebm, _) = Results(folder, problem.label), problem.make()
        for seed in range(options.seeds):
            for contender in contenders:
                limit = contender.seconds(seconds)
                if results.has(contender.name, seed, limit):
                    continue
                if why := contender.cannot(ebm):
                    results.note(contender.name, why)
                    continue
                interpreter = options.interpreters.get(contender.package, sys.executable)
                run = Run(
                    contender.name, problem, seed, seconds, looks, options.threads, options.samples
                )
                measure(run, results, interpreter, limit)
                print(f"{problem.label}, seed {seed}: {results.last(contender.name)}", flush=True)
        if not results.rows:
            continue
        everybody = find(())
        text = (
            f"{table(results.rows, everybody, results.notes, seconds)}\n\n"
            f"{remarks(results.rows)} {machine(options.threads)}\n"
        )
        results.write(text, picture(results.rows, everybody, f"Task {problem.label}"))
        print(text)
    if folder == HERE / "results":
        (HERE / "README.md").write_text(assemble(folder, find(()), "results/"))
    else:
        (folder / "README.md").write_text(assemble(folder, find(()), ""))
        print(f"results in {folder}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        sys.exit(str(error))
