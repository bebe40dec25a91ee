"""Tune every agent in the same way, on other tasks and seeds than a benchmark reports.

    python -m benchmarks.readme.tune                  # hours; what is finished is not run again
    python -m benchmarks.readme.tune --agents soft-q  # some of them: the others' runs are kept
    python -m benchmarks.readme.tune --quick          # a few steps each: only to see that it works

Each agent begins with twelve points, rates and batches, and goes on beside its best, exploration
and replay too where it has them, until that is bracketed (:mod:`benchmarks.readme.points`). The
tasks are `prompts` and `random` unless ``--tasks`` says others, with task seed 7, the seeds 100 to
102, the budget one of reward calls. Of each agent the point with the smallest geometric mean of
KL(policy, target) wins. Writes where every run ended into ``benchmarks/results/tuned.csv`` as soon
as a point is done, goes on from there, and ``python -m benchmarks.readme.protocols`` reads it; at
the end ``tuned.json`` (for ``rl-ebm bench --options``) and ``tuned.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import tyro

from benchmarks.readme.points import Point, ladders, next_point
from benchmarks.readme.tried import Tried, flat, read_tried
from benchmarks.support.machine import describe
from benchmarks.support.runs import geometric_bracket
from rl_ebm.agents import AGENTS
from rl_ebm.files import RunError, write_text
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.studies.bench import Plan, Problem, run
from rl_ebm.studies.bench_rows import RANKED, Rows, last_of, samples_of, write_rows
from rl_ebm.studies.seeds import between

RESULTS = Path(__file__).parents[1] / "results"
CSV = "tuned.csv"
TASK_SEED = 7
SEEDS = (100, 101, 102)
SMALLEST = 1e-9
"""KL below which more is not better, nats"""
SMALL = TransformerConfig(1, 1, 8, 8)
"""of a trial run"""


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    agents: str = ",".join(name for name, entry in AGENTS.items() if not entry.needs_teacher)
    """which, separated by commas"""
    tasks: str = "prompts,random"
    """named tasks, separated by commas; potts and phrases are beyond enumeration"""
    calls: int = 65_536
    """responses that each run may score"""
    samples: int = 1000
    """responses of target and policy each by which a task beyond enumeration is verified"""
    workers: int = 2
    """runs at a time"""
    out: Path = Path("runs/tune")
    """where the runs go"""
    results: Path = RESULTS
    """where tuned.csv is, and the tables go"""
    quick: bool = False
    """two points, few calls, a small network; writes nothing into the results"""


def score(rows: Rows, agent: str, runs: int) -> float:
    """Geometric mean of KL(policy, target) at the end of all runs; infinite if one failed."""
    ends = [max(row[RANKED], SMALLEST) for row in last_of(rows, agent=agent)]
    return geometric_mean(ends) if len(ends) == runs else math.inf


def shown(rows: Rows, agent: str, runs: int) -> str:
    """The score as text; with its bracket where some of it is estimated."""
    value, looks = score(rows, agent, runs), last_of(rows, agent=agent)
    if samples_of(looks) is None or value == math.inf:
        return f"{value:.2g}"
    return between(*geometric_bracket(looks, RANKED, SMALLEST), value)


def settings(options: Options) -> dict[str, Any]:
    """What the plans of all points share."""
    names = options.tasks.split(",")[: 1 if options.quick else None]
    return {
        "problems": tuple(Problem(name, task_seed=TASK_SEED) for name in names),
        "seeds": SEEDS[:1] if options.quick else SEEDS,
        "calls": 4096 if options.quick else options.calls,
        "network": SMALL if options.quick else TransformerConfig(),
        "samples": options.samples,
    }


def try_points(
    options: Options, agents: tuple[str, ...], tried: dict[str, Tried] | None = None
) -> dict[str, Tried]:
    """One point of each agent at a time, until all that are best are bracketed.

    Args:
        tried: what was tried before.
    """
    shared = settings(options)
    runs = len(shared["problems"]) * len(shared["seeds"])
    tried = {agent: dict(points) for agent, points in (tried or {}).items()}
    for agent in agents:
        tried.setdefault(agent, {})
    for _ in range(2 if options.quick else 1000):
        scores = {a: {p: score(rows, a, runs) for p, rows in tried[a].items()} for a in agents}
        found = {agent: next_point(agent, scores[agent]) for agent in agents}
        todo = {agent: point for agent, point in found.items() if point is not None}
        if not todo:
            break
        plan = Plan(tuple(todo), options={a: p.options() for a, p in todo.items()}, **shared)
        rows, _ = run(plan, options.out / _folder(todo), options.workers)
        for agent, point in todo.items():
            tried[agent][point] = _ends(rows, agent, shared)
        if not options.quick:
            write_rows(options.results / CSV, flat(tried, options.calls))
    return tried


def _folder(points: Mapping[str, Point]) -> str:
    """Of the runs of these points, and of no others."""
    return sha256(repr(sorted(points.items(), key=lambda x: x[0])).encode()).hexdigest()[:12]


def _ends(rows: Rows, agent: str, shared: Mapping[str, Any]) -> Rows:
    """Where each run of an agent ended; infinitely far where it failed."""
    known = {(row["task"], row["seed"]): row for row in last_of(rows, agent=agent)}
    return [
        known.get(
            (problem.label, seed),
            {"task": problem.label, "agent": agent, "seed": seed, RANKED: math.inf},
        )
        for problem in shared["problems"]
        for seed in shared["seeds"]
    ]


def best(agent: str, tried: Tried, runs: int) -> Point | None:
    """The point with the smallest score, of several the first; None where each has failed."""
    scores = {point: score(rows, agent, runs) for point, rows in tried.items()}
    found = min(scores, key=lambda point: scores[point], default=None)
    return None if found is None or scores[found] == math.inf else found


def line(agent: str, tried: Tried, runs: int) -> str:
    """An agent's line of the table."""
    point = best(agent, tried, runs)
    if point is None:
        return f"| `{agent}` |  |  |  |  | {len(tried)} | failed |  |"
    has = {n: ladder for n, ladder in ladders(agent).items() if n not in ("explore", "replay")}
    ends = [name for name, x in has.items() if point.told()[name] in (x[0], x[-1])]
    explore = "" if point.explore is None else f"{point.explore:g}"
    replay = "" if point.replay is None else str(point.replay)
    cells = [f"`{agent}`", f"{point.lr:g}", f"{point.batch_size:,}", explore, replay]
    told = shown(tried[point], agent, runs)
    return f"| {' | '.join([*cells, str(len(tried)), told, ', '.join(ends)])} |"


def table(tried: dict[str, Tried], runs: int) -> str:
    """What was chosen, and by what."""
    head = ["agent", "lr", "batch_size", "explore", "replayed for each new one", "points tried"]
    head += ["KL(policy, target)", "at the end of what is tried"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(line(agent, found, runs) for agent, found in tried.items())])


def before(options: Options, tasks: set[str]) -> dict[str, Tried]:
    """What was tried another day.

    Raises:
        RunError: on other tasks or seeds, or with other budgets.
    """
    path = options.results / CSV
    if options.quick or not path.exists():
        return {}
    rows, tried = read_tried(path, options.calls)
    if {row["task"] for row in rows} != tasks or {row["seed"] for row in rows} != set(SEEDS):
        raise RunError(f"{path} is of other tasks or seeds: give another --results")
    return tried


def main(options: Options) -> None:
    torch.set_num_threads(1)  # what the runs have, and what `describe` says
    shared = settings(options)
    known = before(options, {problem.label for problem in shared["problems"]})
    tried = try_points(options, tuple(options.agents.split(",")), known)
    runs = len(shared["problems"]) * len(shared["seeds"])
    text = table(tried, runs)
    ends = flat(tried, options.calls)
    if samples_of(ends) is not None:
        drawn = f"{options.samples:,} exact samples of target and policy each"
        text += f"\n\nIn brackets: what others than these {drawn} would change."
    text += f"\n\n{describe()}\n"
    print(text)
    if not options.quick:
        points = {agent: best(agent, of, runs) for agent, of in tried.items()}
        chosen = {agent: point.options() for agent, point in points.items() if point is not None}
        write_text(options.results / "tuned.json", json.dumps(chosen, indent=1) + "\n")
        write_text(options.results / "tuned.md", text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
