"""Tune every agent on the same small grid, on other tasks and seeds than a benchmark reports.

    python -m benchmarks.readme.tune            # hours; what is finished is not run again
    python -m benchmarks.readme.tune --quick    # a few steps each: only to see that it works

The tasks are `prompts` and `random` unless ``--tasks`` says others, with task seed 7, the seed 100,
the budget one of reward calls. Of each agent the point with the smallest geometric mean of
KL(policy, target) wins. Writes ``benchmarks/results/tuned.json`` (for
``rl-ebm bench --options``) and ``tuned.md``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import tyro

from benchmarks.support.machine import describe
from benchmarks.support.runs import geometric_bracket
from rl_ebm.agents import AGENTS
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.studies.bench import Plan, Problem, run
from rl_ebm.studies.bench_rows import RANKED, Rows, last_of, samples_of
from rl_ebm.studies.seeds import between
from rl_ebm.training.checkpoint import write_text

RESULTS = Path(__file__).parents[1] / "results"
RATES = (3e-3, 1e-2, 3e-2)
BATCHES = (256, 1024)
TASK_SEED = 7
SEEDS = (100,)
SMALLEST = 1e-9
"""KL below which more is not better, nats"""


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
    quick: bool = False
    """two points, few calls, a small network; writes nothing into the results"""


def grid(quick: bool) -> list[dict[str, Any]]:
    """The same points for every agent."""
    points = product(RATES[:1], BATCHES[:2]) if quick else product(RATES, BATCHES)
    return [{"lr": lr, "batch_size": batch} for lr, batch in points]


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


def main(options: Options) -> None:
    torch.set_num_threads(1)  # what the runs have, and what `describe` says
    agents = tuple(options.agents.split(","))
    network = TransformerConfig(1, 1, 8, 8) if options.quick else TransformerConfig()
    problems = tuple(Problem(name, task_seed=TASK_SEED) for name in options.tasks.split(","))
    found: dict[str, list[tuple[float, str, dict[str, Any]]]] = {agent: [] for agent in agents}
    for i, point in enumerate(grid(options.quick)):
        plan = Plan(
            agents,
            problems[:1] if options.quick else problems,
            SEEDS[:1] if options.quick else SEEDS,
            2048 if options.quick else options.calls,
            network=network,
            options=dict.fromkeys(agents, point),
            samples=options.samples,
        )
        rows, _ = run(plan, options.out / str(i), options.workers)
        for agent in agents:
            runs = len(plan.problems) * len(plan.seeds)
            found[agent].append((score(rows, agent, runs), shown(rows, agent, runs), point))
    best = {agent: min(points, key=lambda x: x[0]) for agent, points in found.items()}
    lines = ["| agent | lr | batch_size | KL(policy, target) |", "|---|---|---|---|"]
    lines += [
        f"| `{agent}` | {point['lr']:g} | {point['batch_size']:,} | {told} |"
        for agent, (_, told, point) in best.items()
    ]
    if any("[" in line for line in lines):
        drawn = f"{options.samples:,} exact samples of target and policy each"
        lines += ["", f"In brackets: what others than these {drawn} would change."]
    text = "\n".join([*lines, "", describe()]) + "\n"
    print(text)
    if not options.quick:
        chosen = {agent: point for agent, (*_, point) in best.items()}
        write_text(RESULTS / "tuned.json", json.dumps(chosen, indent=1) + "\n")
        write_text(RESULTS / "tuned.md", text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
