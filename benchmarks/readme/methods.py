"""Every method on every task under one budget of reward calls, each tuned on other tasks and seeds.

    python -m benchmarks.readme.methods                    # hours; what is finished stays
    python -m benchmarks.readme.methods --table FILE.tsv   # a table of yours as well, at beta 0.1
    python -m benchmarks.readme.methods --quick            # a few steps: only to see that it works

The options are those of ``benchmarks/results/tuned.json`` (see benchmarks/readme/tune.py). Writes
``benchmarks/results/methods.md``, one line a method and one column a task, ``when.md``, one line a
task, and what ``rl-ebm bench`` writes, ``results.csv``, ``report.md`` and a picture a task, to
``benchmarks/results/methods/``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import torch
import tyro

from benchmarks.support.machine import describe
from benchmarks.support.runs import geometric_bracket
from rl_ebm.agents import AGENTS
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.studies.bench import Plan, Problem, run
from rl_ebm.studies.bench_options import read_options
from rl_ebm.studies.bench_report import targets, write_report
from rl_ebm.studies.bench_rows import RANKED, Rows, last_of, samples_of
from rl_ebm.studies.bench_rows import RESULTS as CSV
from rl_ebm.studies.seeds import between, geometric_interval
from rl_ebm.training.checkpoint import write_text

RESULTS = Path(__file__).parents[1] / "results"
TASKS = {
    "random": "nothing generalises: each response has a reward of its own",
    "zipf": "a long tail",
    "peaked": "some responses have nearly all of the mass",
    "pairwise": "rewards of pairs of positions, which generalise",
    "prompts": "several prompts with a law each",
    "planted": "far-apart modes that the reference hardly draws",
    "lookahead": "the first token decides what the last one may be",
    "sparse": "one response in ten thousand pays",
    "star": "a path on a graph for each prompt: its first step decides",
    "potts": "couplings of neighbours, beyond enumeration",
    "phrases": "one phrase wanted, one not, over fitted bigrams, beyond enumeration",
}
"""named tasks, and what each is like"""
COMMON = ("policy-gradient", "ppo", "grpo")
"""what most people use"""
SMALLEST = 1e-12
"""KL below which rounding is all there is, nats"""


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    table: Path | None = None
    """a table file, scaled to [0, 1], at beta 0.1"""
    tasks: str = "random,zipf,peaked,pairwise,prompts,planted,lookahead,sparse,star"
    """named tasks, separated by commas; potts and phrases are beyond enumeration"""
    samples: int = 1000
    """responses of target and policy each by which a task beyond enumeration is verified"""
    seeds: int = 3
    """runs of each method on each task"""
    calls: int = 65_536
    """responses that each run may score"""
    workers: int = 2
    """runs at a time, each with one thread"""
    out: Path = Path("runs/methods")
    """where the runs go"""
    quick: bool = False
    """two methods, one task, a small network; writes nothing into the results"""


def ends(rows: Rows, agent: str) -> list[float]:
    """KL(policy, target) at the end of an agent's runs on a task."""
    return [max(row[RANKED], SMALLEST) for row in last_of(rows, agent=agent)]


def cell(values: list[float], seeds: int) -> str:
    """Geometric mean and 95% interval; infinite where one is, failed where one is missing."""
    if len(values) < seeds:
        return "failed"
    return geometric_interval(values)


def shown(rows: Rows, agent: str, seeds: int) -> str:
    """An agent's cell; of estimates with what other samples of its policies would change."""
    told, looks = cell(ends(rows, agent), seeds), last_of(rows, agent=agent)
    if samples_of(looks) is None or len(looks) < seeds:
        return told
    return f"{told} {between(*geometric_bracket(looks, RANKED, SMALLEST))}"


def best(rows: Rows, agents: tuple[str, ...], seeds: int) -> set[str]:
    """The agent of the smallest geometric mean on a task, of those without a failed run.

    Beside it those that the samples of verification do not tell from it, where there are any.
    """
    looks = {a: last_of(rows, agent=a) for a in agents}
    means = {a: geometric_mean(ends(rows, a)) for a, x in looks.items() if len(x) == seeds}
    first = min(means, key=lambda agent: means[agent])
    ends_of = {a: geometric_bracket(looks[a], RANKED, SMALLEST) for a in means}
    return {first} | {a for a, (low, _) in ends_of.items() if low < ends_of[first][1]}


def table(plan: Plan, rows: Rows) -> str:
    """One line for each agent, one column for each task; the best that needs no teacher in bold."""
    lines = [["agent", "ends at the EBM", *(p.label for p in plan.problems)]]
    ends_there = [targets(plan, problem) for problem in plan.problems]
    sampled = tuple(a for a in plan.agents if not AGENTS[a].needs_teacher)
    tasks = [[row for row in rows if row["task"] == p.label] for p in plan.problems]
    seeds = len(plan.seeds)
    winners = [best(mine, sampled, seeds) for mine in tasks]
    for agent in plan.agents:
        there = {known[agent] for known in ends_there}
        verdict = {True: "yes", False: "no", None: "not known"}[
            next(iter(there)) if len(there) == 1 else None
        ]
        cells = [shown(mine, agent, seeds) for mine in tasks]
        marked = [f"**{c}**" if agent in w else c for c, w in zip(cells, winners, strict=True)]
        lines.append([f"`{agent}`", verdict, *marked])
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def when(plan: Plan, rows: Rows) -> str:
    """One line for each task: what it is like, who comes closest, and the usual choices."""
    seeds = len(plan.seeds)
    sampled = [a for a in plan.agents if not AGENTS[a].needs_teacher]
    usual = [a for a in COMMON if a in sampled]
    lines = [["task", "what it is like", "closest", "second", *(f"`{a}`" for a in usual)]]
    for problem in plan.problems:
        mine = [row for row in rows if row["task"] == problem.label]
        found = {a: ends(mine, a) for a in sampled}
        means = {a: geometric_mean(x) for a, x in found.items() if len(x) == seeds}
        order = sorted(means, key=lambda a: means[a])[:2]
        cells = [f"`{a}` {shown(mine, a, seeds)}" for a in order]
        cells += [""] * (2 - len(cells)) + [shown(mine, a, seeds) for a in usual]
        about = TASKS.get(problem.name, "scores of a file, beta 0.1")
        lines.append([problem.label, about, *cells])
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def main(options: Options) -> None:
    torch.set_num_threads(1)  # what the runs have, and what `describe` says
    problems = [Problem(name) for name in options.tasks.split(",")]
    if options.table is not None:
        problems.append(Problem(str(options.table), 0.1))
    agents, network, calls, tuned = tuple(AGENTS), TransformerConfig(), options.calls, None
    if (RESULTS / "tuned.json").exists():
        tuned = RESULTS / "tuned.json"
    if options.quick:
        problems, agents, calls = [Problem("lookahead")], ("vargrad", "grpo"), 16_384
        network, tuned = TransformerConfig(1, 1, 8, 8), None
    plan = Plan(
        agents,
        tuple(problems),
        tuple(range(options.seeds)),
        calls,
        network=network,
        options={k: v for k, v in read_options(tuned).items() if k in agents},
        samples=options.samples,
    )
    rows, failed = run(plan, options.out, options.workers)
    write_report(plan, rows, options.out, failed)
    chosen = "its defaults" if tuned is None else "chosen by benchmarks/readme/tune.py"
    estimated = ""
    if (drawn := samples_of(rows)) is not None:
        estimated = (
            f"Beyond enumeration KL is estimated from {drawn:,} exact samples of target and policy "
            "each; in brackets is what other samples would change, and all that these do not tell "
            "from the smallest are in bold. "
        )
    text = (
        f"{table(plan, rows)}\n\nKL(policy, target) in nats after {calls:,} responses scored, "
        f"geometric mean (95% interval) of {options.seeds} seeds; in bold the smallest of a task "
        f"among those that need no teacher. Learning rate and batch size of each: {chosen}. "
        f"{estimated}{describe()}\n"
    )
    print(text)
    advice = f"{when(plan, rows)}\n\nFrom the table of all methods, in the same units.\n"
    print(advice)
    if options.quick:
        return
    write_text(RESULTS / "methods.md", text)
    write_text(RESULTS / "when.md", advice)
    kept = RESULTS / "methods"
    kept.mkdir(parents=True, exist_ok=True)
    for name in (CSV, "report.md", *(f"{p.label}.png" for p in problems)):
        shutil.copy(options.out / name, kept / name)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
