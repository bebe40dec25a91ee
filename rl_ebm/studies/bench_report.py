"""What a benchmark says: a Markdown report with intervals, curves, and the exact frontier."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_ebm.agents import entry_of
from rl_ebm.ebm import EBM
from rl_ebm.exact import lists, solve, summarise
from rl_ebm.exact.dispatch import TooLargeError
from rl_ebm.files import write_atomically
from rl_ebm.messages.words import count_text, printable
from rl_ebm.studies.audit import is_target
from rl_ebm.studies.bench import REPORT, Plan, Problem
from rl_ebm.studies.bench_rows import (
    BENCHED,
    RANKED,
    Rows,
    bracket,
    bracket_of_mean,
    last_of,
    samples_of,
)
from rl_ebm.studies.problems import problems
from rl_ebm.studies.seeds import between, interval
from rl_ebm.training.checkpoint import write_text
from rl_ebm.training.loop import looks_at_all
from rl_ebm.verification.entry import REWARD

FLOOR = 1e-9
"""smallest KL that a curve shows, nats"""
LINES = {"-": "o", "--": "x", ":": "^", "-.": "s"}
"""with the markers of their points"""
SWEEP = torch.logspace(-1.5, 1.5, 25).tolist()
"""beta of the frontier, in units of the benchmark's"""
SPARSE = 3
"""of these one in so many where E[R] is not read off a list, which takes seconds each"""


def write_report(plan: Plan, rows: Rows, out: Path, failed: Sequence[str] = ()) -> str:
    """report.md and its pictures, beside results.csv; the text.

    Args:
        failed: a line for each run without a result.
    """
    sections = []
    for problem in plan.problems:
        mine = [row for row in rows if row["task"] == problem.label]
        figure = picture(plan, problem, mine)
        drawn = BytesIO()
        figure.savefig(drawn, dpi=110, format="png")
        write_atomically(out / problem.picture, _writer(drawn.getvalue()))
        label = printable(problem.label)
        parts = [f"## {label}", *estimated(problem, mine), table(plan, problem, mine)]
        sections.append("\n\n".join([*parts, f"![{label}]({printable(problem.picture)})"]))
    budget = f"{plan.calls:,} responses scored"
    if plan.seconds is not None:
        budget += f", at most {plan.seconds:g} s"
    network = plan.network
    how = "Exact KL in nats"
    if samples_of(rows) is not None:
        how = "KL in nats, exact unless a section says how it was estimated,"
    text = "\n\n".join(
        [
            "# Benchmark",
            f"Budget of each run: {budget}. The same Transformer ({network.layers} layers, width "
            f"{network.dim}) with the same initial weights for each seed; one thread a run. "
            f"{how} at the end, mean ± half-width of its 95% interval over "
            f"{len(plan.seeds)} seeds (Student's t). *Ends at the EBM* is about the objective: "
            "whether its exact expected gradient converges to p* (`rl-ebm audit`).",
            *sections,
        ]
    )
    if failed:
        lines = "\n".join(f"- {printable(line)}" for line in failed)
        text += f"\n\n**Failed runs**, which count nowhere above:\n\n{lines}"
    write_text(out / REPORT, text + "\n")
    return text


def _writer(data: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(data)


def estimated(problem: Problem, rows: Rows) -> list[str]:
    """A paragraph on what the numbers of a task beyond enumeration are; none where it is exact."""
    samples = samples_of(rows)
    if samples is None:
        return []
    ebm, _ = problem.make()
    return [
        f"Estimated from {samples:,} exact samples of the target and as many of each policy: there "
        f"are {count_text(ebm.space.num_sequences)} responses. ± is the half-width over the seeds' "
        "estimates: what other seeds would change. In brackets, from the mean of the runs' lower "
        "ends to that of their upper ones, is what other samples of these very policies would "
        "change: each run has a 95% interval of its own (asymptotic for KLs; an open end is "
        "infinite). Neither contains the other: runs that end at the same step are verified on the "
        "same samples of the target. Lines whose brackets overlap are put in no order by these "
        "samples. *Ends at the EBM* is known here where an objective states it: no gradient flow "
        "is followed over so many responses."
    ]


def table(plan: Plan, problem: Problem, rows: Rows) -> str:
    """One line for each agent, the smallest KL(policy, target) first."""
    compared = [figure for figure in BENCHED if figure.unit != REWARD]
    compared.sort(key=lambda figure: figure.key != RANKED)
    ends_there = targets(plan, problem)
    lines = []
    for agent in plan.agents:
        ends = last_of(rows, agent=agent)
        if not ends:  # all of its runs failed
            continue
        cells = [_cell(ends, figure.key) for figure in compared]
        middle = statistics.median(row[RANKED] for row in ends)
        calls = statistics.median(row["reward_calls"] for row in ends)
        seconds = interval([row["seconds"] for row in ends])
        there = {True: "yes", False: "no", None: "not known"}[ends_there[agent]]
        lines.append((middle, [f"`{agent}`", there, f"{calls:,.0f}", seconds, *cells]))
    head = ["agent", "ends at the EBM", "reward calls", "seconds", *(f.label for f in compared)]
    body = [" | ".join(cells) for _, cells in sorted(lines, key=lambda line: line[0])]
    return "\n".join(
        [
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
            *(f"| {line} |" for line in body),
        ]
    )


def _cell(ends: Rows, key: str) -> str:
    """Over the seeds, with the runs' own intervals in brackets where they are estimates."""
    told = interval([row[key] for row in ends])
    if samples_of(ends) is None:
        return told
    bounds = bracket_of_mean(ends, key)
    if len(ends) == 1:
        return f"{between(*bounds, ends[0][key])} (one run)"
    return f"{told} {between(*bounds)}"


def targets(plan: Plan, problem: Problem) -> dict[str, bool | None]:
    """Whether each agent's objective, with its options, has the EBM as its fixed point.

    None where that is not known: an agent without a stated limit, a flow that did not settle,
    responses of reward -inf, or more of them than are listed.
    """
    ebm, _ = problem.make()
    solution = solve(ebm)
    entries = [(a, entry_of(a), plan.config(a)) for a in plan.agents]
    if solution.forbids_responses or not lists(solution):
        return {a: entry.ends_at_target(config) for a, entry, config in entries}
    cases = problems(solution)
    return {a: is_target([e.limit(config, c) for c in cases], cases) for a, e, config in entries}


def frontier(ebm: EBM) -> tuple[list[float], list[float]]:
    """KL(p*, p_ref) and E[R] of the exact solution as beta goes up and down: nothing is better.

    Without the points that have no exact solution: an automaton's reward with a hidden part is
    solved at beta = 1 alone, and E[R] is not known there.
    """
    kls, rewards = [], []
    every = 1 if looks_at_all(ebm) else SPARSE
    for factor in SWEEP[::every]:
        beta = ebm.beta * factor
        other = EBM(ebm.space, ebm.reward_model, beta, ebm.reference, ebm.prompts)
        try:
            solution = solve(other)
        except TooLargeError:
            continue
        parts = [summarise(solution, 0, prompt) for prompt in range(ebm.num_prompts)]
        gains = [p.expected_reward for p in parts if p.expected_reward is not None]
        if not gains:
            continue
        # KL(p*, p_ref) = E[R] / beta - log Z
        kls.append(statistics.fmean(gains) / beta - float(solution.log_z.mean()))
        rewards.append(statistics.fmean(gains))
    return kls, rewards


def picture(plan: Plan, problem: Problem, rows: Rows) -> Figure:
    """KL against calls, KL against seconds, and E[R] against KL(policy, reference)."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    by_calls, by_seconds, pareto = figure.subplots(1, 3)
    for agent, style in zip(by_end(plan.agents, rows), _styles(), strict=False):
        mine = [row for row in rows if row["agent"] == agent]
        for axes, key in ((by_calls, "reward_calls"), (by_seconds, "seconds")):
            _curves(axes, mine, key, plan.seeds, style, agent)
        _points(pareto, last_of(mine), style, agent)
    ebm, _ = problem.make()
    pareto.plot(*frontier(ebm), color="0.4", linewidth=1.2, label="exact frontier")
    pareto.set(xlabel="KL(policy, reference) (nats)", ylabel="E[R]", title="Reward against KL")
    told, bands = "exact KL(policy, target) (nats)", "all seeds"
    if samples_of(rows) is not None:
        told, bands = "KL(policy, target) (nats)", "its 95% interval of sampling"
    for axes, label in ((by_calls, "responses scored"), (by_seconds, "trained seconds")):
        axes.set(yscale="log", xlabel=label, ylabel=told)
        axes.grid(alpha=0.3)
    by_calls.set_title(f"{printable(problem.label)}, beta = {problem.beta:g}")
    by_seconds.set_title(f"the run in the middle; band: {bands}")
    lines, labels = by_calls.get_legend_handles_labels()
    frontier_line, _ = pareto.get_legend_handles_labels()
    figure.legend(
        [*lines, frontier_line[-1]],
        [*labels, "exact frontier"],
        loc="outside right upper",
        title="closest first",
        fontsize=8,
    )
    return figure


def by_end(agents: Sequence[str], rows: Rows) -> list[str]:
    """Agents, that whose run in the middle ends closest to the EBM first; without a run last."""

    def end(agent: str) -> float:
        found = [row[RANKED] for row in last_of(rows, agent=agent)]
        return statistics.median_low(found) if found else math.inf

    return sorted(agents, key=end)


@dataclass(frozen=True)
class Style:
    """How an agent is drawn: a colour of ten, and a kind of line and of point for each ten."""

    color: str
    line: str
    marker: str


def _styles() -> Iterator[Style]:
    kinds = itertools.cycle(LINES.items())
    return (Style(f"C{k}", *kind) for kind in kinds for k in range(10))


def _points(axes: Axes, ends: Rows, style: Style, label: str) -> None:
    """E[R] against KL(policy, reference) of each run, with their intervals where there are any."""
    kls = [row["kl_reference"] for row in ends]
    rewards = [row["expected_reward_policy"] for row in ends]
    color = style.color
    axes.scatter(kls, rewards, color=color, marker=style.marker, s=18, label=label, zorder=3)
    if samples_of(ends) is None:
        return
    for row, kl, reward in zip(ends, kls, rewards, strict=True):
        axes.plot(bracket(row, "kl_reference"), (reward, reward), color=color, linewidth=0.8)
        axes.plot((kl, kl), bracket(row, "expected_reward_policy"), color=color, linewidth=0.8)


def _curves(
    axes: Axes, rows: Rows, key: str, seeds: Sequence[int], style: Style, label: str
) -> None:
    """The run that ends in the middle of its seeds, and what lies between all of them."""
    runs = [run for seed in seeds if (run := [row for row in rows if row["seed"] == seed])]
    if not runs:
        return
    middle = sorted(runs, key=lambda run: float(run[-1][RANKED]))[(len(runs) - 1) // 2]
    at = [row[key] for row in middle]
    shown = [_shown(row[RANKED]) for row in middle]
    axes.plot(at, shown, color=style.color, linestyle=style.line, linewidth=1.3, label=label)
    if samples_of(middle) is not None:
        low, high = zip(*(bracket(row, RANKED) for row in middle), strict=True)
        band = [_shown(x) for x in low], [_shown(x) for x in high]
    else:
        # A look of one seed is between two of another's: on the straight line that is drawn.
        drawn = [
            np.interp(at, [row[key] for row in run], [_shown(row[RANKED]) for row in run])
            for run in runs
        ]
        band = np.min(drawn, 0).tolist(), np.max(drawn, 0).tolist()
    axes.fill_between(at, *band, color=style.color, alpha=0.15, linewidth=0)


def _shown(kl: float) -> float:
    """Where a curve has a KL; nowhere where it is infinite."""
    return max(kl, FLOOR) if math.isfinite(kl) else math.nan
