"""How far conclusions depend on how the methods were tuned.

    python -m benchmarks.readme.protocols            # hours; what is finished is not run again
    python -m benchmarks.readme.protocols --quick    # a few steps each: only to see that it works

Smaller tunings would have seen less of the runs of ``python -m benchmarks.readme.tune``: fewer
points, one seed, one task. Each of these protocols chooses from what it sees, and what it chose
runs on tasks that nothing was tuned on. A conclusion is that one method ends closer than another on
a task, where the 95% interval of the difference over the seeds says so; the table counts how many
of them another protocol would have kept. Its second line is what other seeds alone would change:
the whole tuning's choices once more. Writes ``benchmarks/results/protocols.md``, ``protocols.csv``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import tyro

from benchmarks.readme.points import Point
from benchmarks.readme.tried import Tried, read_tried
from benchmarks.readme.tune import RESULTS, SMALL, SMALLEST, best
from benchmarks.support.machine import describe
from rl_ebm.files import RunError, write_text
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.studies.bench import Plan, Problem, run
from rl_ebm.studies.bench_rows import RANKED, Rows, last_of, write_rows
from rl_ebm.studies.seeds import geometric_interval, half_width
from rl_ebm.training.loop import looks_at_all

FEW = {"lr": (3e-3, 1e-2, 3e-2), "batch_size": (256, 1024)}
"""what a small tuning tries, as the README's first one did"""
ALL, AGAIN = "all", "all, other seeds"
Choices = dict[str, dict[str, dict[str, Any]]]
"""options by protocol and agent"""
Ends = dict[str, dict[str, Rows]]
"""where the runs of each agent ended, by protocol"""


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    tuned: Path = RESULTS / "tuned.csv"
    """where every run of the tuning ended"""
    tasks: str = "pairwise,planted,lookahead,zipf"
    """named tasks that nothing was tuned on, separated by commas"""
    seeds: int = 3
    """runs of each method on each task"""
    calls: int = 65_536
    """responses that each run may score"""
    workers: int = 2
    """runs at a time"""
    out: Path = Path("runs/protocols")
    """where the runs go"""
    quick: bool = False
    """one task, few calls, a small network; writes nothing into the results"""


@dataclass(frozen=True)
class Protocol:
    """A way to tune: what it sees of the runs; None for all."""

    seeds: tuple[int, ...] | None = None
    tasks: tuple[str, ...] | None = None
    few: bool = False
    """only the points of a small tuning, at the agent's own exploration and without replay"""

    def sees(self, row: Mapping[str, Any]) -> bool:
        """Whether it has a run."""
        return (self.seeds is None or row["seed"] in self.seeds) and (
            self.tasks is None or row["task"] in self.tasks
        )

    def tries(self, point: Point, first: Point) -> bool:
        """Whether it has a point; the first is one of the grid, which all agents begin with."""
        own = (point.explore, point.replay) == (first.explore, first.replay)
        few = own and point.lr in FEW["lr"] and point.batch_size in FEW["batch_size"]
        return few or not self.few


def protocols(rows: Rows) -> dict[str, Protocol]:
    """The whole tuning first, then what is less of it."""
    seeds, tasks = (sorted({row[key] for row in rows}) for key in ("seed", "task"))
    found = {ALL: Protocol()}
    if len(seeds) > 1:
        found |= {f"seed {seed} alone": Protocol(seeds=(seed,)) for seed in seeds}
    if len(tasks) > 1:
        found |= {f"`{task}` alone": Protocol(tasks=(task,)) for task in tasks}
    return found | {"six points, one seed": Protocol(seeds=(seeds[0],), few=True)}


def choice(agent: str, tried: Tried, protocol: Protocol, runs: int) -> Point | None:
    """What a protocol would have chosen; None where each of its points has a run that failed.

    Args:
        runs: that it sees of a point of which none has failed.
    """
    first = next(iter(tried))
    seen = {
        point: [row for row in rows if protocol.sees(row)]
        for point, rows in tried.items()
        if protocol.tries(point, first)
    }
    return best(agent, seen, runs)


def choices(rows: Rows, tried: dict[str, Tried]) -> Choices:
    """The options that each protocol chooses, of the agents that have any."""
    found: Choices = {}
    for name, protocol in protocols(rows).items():
        runs = len({(row["task"], row["seed"]) for row in rows if protocol.sees(row)})
        points = {agent: choice(agent, of, protocol, runs) for agent, of in tried.items()}
        found[name] = {agent: p.options() for agent, p in points.items() if p is not None}
    return found


def run_choices(chosen: Choices, shared: dict[str, Any], out: Path, workers: int) -> Ends:
    """Each distinct choice of each agent once.

    Args:
        shared: what the plans of all choices share.
    """
    distinct: dict[str, list[dict[str, Any]]] = {
        agent: [] for of in chosen.values() for agent in of
    }
    for of in chosen.values():
        for agent, options in of.items():
            if options not in distinct[agent]:
                distinct[agent].append(options)
    found: dict[tuple[str, int], Rows] = {}
    for k in range(max(map(len, distinct.values()))):
        todo = {agent: options[k] for agent, options in distinct.items() if k < len(options)}
        rows, _ = run(Plan(tuple(todo), options=todo, **shared), out / str(k), workers)
        found |= {(agent, k): last_of(rows, agent=agent) for agent in todo}
    return {
        name: {agent: found[agent, distinct[agent].index(options)] for agent, options in of.items()}
        for name, of in chosen.items()
    }


def conclusions(ends: dict[str, Rows]) -> set[tuple[str, str, str]]:
    """(task, closer, farther): which agents' difference over the seeds has a sign."""
    logs = {
        (row["task"], agent, row["seed"]): math.log(max(row[RANKED], SMALLEST))
        for agent, rows in ends.items()
        for row in rows
    }
    tasks, seeds = (sorted({key[i] for key in logs}) for i in (0, 2))
    found = set()
    for task in tasks:
        for one, other in permutations(ends, 2):
            try:
                off = [logs[task, other, s] - logs[task, one, s] for s in seeds]
            except KeyError:  # a run of it failed
                continue
            if sum(off) / len(off) > half_width(off):
                found.add((task, one, other))
    return found


def closest(ends: dict[str, Rows], task: str, seeds: int) -> tuple[str, list[float]]:
    """The agent with the smallest geometric mean on a task, and where its runs ended.

    Raises:
        RunError: each has a run that failed.
    """
    values = {
        agent: [max(row[RANKED], SMALLEST) for row in rows if row["task"] == task]
        for agent, rows in ends.items()
    }
    whole = {agent: x for agent, x in values.items() if len(x) == seeds}
    if not whole:
        raise RunError(f"each agent has a run that failed on {task}")
    return min(whole.items(), key=lambda item: geometric_mean(item[1]))


def moved(ends: Ends) -> str:
    """A line for each protocol: how many conclusions of the whole tuning it keeps."""
    full = conclusions(ends[ALL])
    lines = ["| tuned by | conclusions | kept of all's | not told | told the other way | new |"]
    lines.append("|---|---|---|---|---|---|")
    for name, of in ends.items():
        found = conclusions(of)
        turned = {(task, other, one) for task, one, other in full} & found
        kept, new = full & found, found - full - turned
        counts = (len(found), len(kept), len(full) - len(kept) - len(turned), len(turned), len(new))
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def winners(ends: Ends, tasks: list[str], seeds: int) -> str:
    """A line for each protocol: the closest agent of each task."""
    lines = [f"| tuned by | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, of in ends.items():
        cells = []
        for task in tasks:
            agent, values = closest(of, task, seeds)
            cells.append(f"`{agent}` {geometric_interval(values)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(ends: Ends) -> str:
    """A line for each agent: its mean over tasks by protocol, and the largest by the smallest."""
    lines = [f"| agent | {' | '.join(ends)} | largest by smallest |"]
    lines.append("|---" * (len(ends) + 2) + "|")
    most = max(len(rows) for of in ends.values() for rows in of.values())
    for agent in dict.fromkeys(agent for of in ends.values() for agent in of):
        rows = [of.get(agent, []) for of in ends.values()]
        values = [
            geometric_mean(max(row[RANKED], SMALLEST) for row in x) if len(x) == most else math.inf
            for x in rows
        ]
        by = "" if math.inf in values else f"{max(values) / min(values):.2g}"
        cells = ["failed" if x == math.inf else f"{x:.2g}" for x in values]
        lines.append(f"| `{agent}` | {' | '.join([*cells, by])} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    torch.set_num_threads(1)  # what the runs have, and what `describe` says
    rows, tried = read_tried(options.tuned)
    problems = [Problem(name) for name in options.tasks.split(",")][: 1 if options.quick else None]
    on = {row["task"] for row in rows}
    for problem in problems:
        if problem.label in on:
            raise ValueError(f"methods were tuned on {problem.label}: give tasks that are held out")
        if not looks_at_all(problem.make()[0]):
            raise ValueError(f"{problem.label} is beyond enumeration: give tasks that are exact")
    chosen = choices(rows, tried)
    chosen["defaults, untuned"] = {agent: {} for agent in tried}
    calls = 4096 if options.quick else options.calls
    shared = {
        "problems": tuple(problems),
        "seeds": tuple(range(options.seeds)),
        "calls": calls,
        "network": SMALL if options.quick else TransformerConfig(),
    }
    ends = run_choices(chosen, shared, options.out, options.workers)
    others = {"seeds": tuple(range(options.seeds, 2 * options.seeds))}
    again = run_choices(
        {AGAIN: chosen[ALL]}, shared | others, options.out / "again", options.workers
    )
    ends = {ALL: ends.pop(ALL)} | again | ends
    tasks = [problem.label for problem in problems]
    pairs = len(tasks) * math.comb(len(tried), 2)
    text = (
        f"{moved(ends)}\n\nA conclusion: on one of {', '.join(tasks)} one method ends closer than "
        f"another, the 95% interval of the difference of log KL(policy, target) over "
        f"{options.seeds} seeds says so; of {pairs:,} comparisons one in twenty may say so by "
        f"chance. `{ALL}` are all points, seeds and tasks of [`tune.py`](../readme/tune.py), and "
        f"`{AGAIN}` runs the same choices once more: what a line loses beyond that is due to its "
        "tuning. Each other protocol chose from less of the same runs, of points that the whole "
        "tuning walked to: one that walks by itself may differ more. Where its choice is the same, "
        "so are its runs.\n\n"
        f"{winners(ends, tasks, options.seeds)}\n\nThe closest method of each task, KL(policy, "
        f"target) in nats after {calls:,} responses scored, geometric mean (95% interval).\n\n"
        f"{spread(ends)}\n\nGeometric means over all of these tasks and seeds. {describe()}\n"
    )
    print(text)
    if not options.quick:
        flat = [
            {"protocol": name, **row} for name, of in ends.items() for x in of.values() for row in x
        ]
        write_text(RESULTS / "protocols.md", text)
        write_rows(RESULTS / "protocols.csv", flat)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
