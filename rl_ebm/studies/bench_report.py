"""What a benchmark says: a Markdown report with intervals, curves, and the exact frontier."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_ebm.agents import entry_of
from rl_ebm.ebm import EBM
from rl_ebm.exact import solve, summarise
from rl_ebm.studies.audit import is_target
from rl_ebm.studies.bench import BENCHED, Plan, Problem, Rows, last_of
from rl_ebm.studies.problems import problems
from rl_ebm.studies.seeds import interval
from rl_ebm.training.checkpoint import write_text
from rl_ebm.verification.entry import REWARD

FLOOR = 1e-9
"""smallest KL that a curve shows, nats"""
RANKED = "kl_policy_target"
"""what agents are ordered by"""
SWEEP = torch.logspace(-1.5, 1.5, 25).tolist()
"""beta of the frontier, in units of the benchmark's"""


def write_report(plan: Plan, rows: Rows, out: Path, failed: Sequence[str] = ()) -> str:
    """report.md and its pictures, beside results.csv; the text.

    Args:
        failed: a line for each run without a result.
    """
    sections = []
    for problem in plan.problems:
        mine = [row for row in rows if row["task"] == problem.label]
        figure = picture(plan, problem, mine)
        name = f"{problem.label}.png"
        figure.savefig(out / name, dpi=110)
        sections.append(
            f"## {problem.label}\n\n{table(plan, problem, mine)}\n\n![{problem.label}]({name})"
        )
    budget = f"{plan.calls:,} responses scored"
    if plan.seconds is not None:
        budget += f", at most {plan.seconds:g} s"
    network = plan.network
    text = "\n\n".join(
        [
            "# Benchmark",
            f"Budget of each run: {budget}. The same Transformer ({network.layers} layers, width "
            f"{network.dim}) with the same initial weights for each seed; one thread a run. Exact "
            "KL in nats at the end, mean ± half-width of its 95% interval over "
            f"{len(plan.seeds)} seeds (Student's t). *Ends at the EBM* is about the objective: "
            "whether its exact expected gradient converges to p* (`rl-ebm audit`).",
            *sections,
        ]
    )
    if failed:
        lines = "\n".join(f"- {line}" for line in failed)
        text += f"\n\n**Failed runs**, which count nowhere above:\n\n{lines}"
    write_text(out / "report.md", text + "\n")
    return text


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
        cells = [interval([row[figure.key] for row in ends]) for figure in compared]
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


def targets(plan: Plan, problem: Problem) -> dict[str, bool | None]:
    """Whether each agent's objective, with its options, has the EBM as its fixed point.

    None where that is not known: an agent without a stated limit, a flow that did not settle, or
    responses of reward -inf.
    """
    ebm, _ = problem.make()
    solution = solve(ebm)
    entries = [(a, entry_of(a), plan.config(a)) for a in plan.agents]
    if solution.forbids_responses:
        return {a: entry.ends_at_target(config) for a, entry, config in entries}
    cases = problems(solution)
    return {a: is_target([e.limit(config, c) for c in cases], cases) for a, e, config in entries}


def frontier(ebm: EBM) -> tuple[list[float], list[float]]:
    """KL(p*, p_ref) and E[R] of the exact solution as beta goes up and down: nothing is better."""
    kls, rewards = [], []
    for factor in SWEEP:
        beta = ebm.beta * factor
        other = EBM(ebm.space, ebm.reward_model, beta, ebm.reference, ebm.prompts)
        solution = solve(other)
        parts = [summarise(solution, 0, prompt) for prompt in range(ebm.num_prompts)]
        gains = [p.expected_reward for p in parts if p.expected_reward is not None]
        # KL(p*, p_ref) = E[R] / beta - log Z
        kls.append(statistics.fmean(gains) / beta - float(solution.log_z.mean()))
        rewards.append(statistics.fmean(gains))
    return kls, rewards


def picture(plan: Plan, problem: Problem, rows: Rows) -> Figure:
    """KL against calls, KL against seconds, and E[R] against KL(policy, reference)."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    by_calls, by_seconds, pareto = figure.subplots(1, 3)
    palette = matplotlib.colormaps["tab10" if len(plan.agents) <= 10 else "tab20"]
    for k, agent in enumerate(plan.agents):
        mine = [row for row in rows if row["agent"] == agent]
        color = palette(k % palette.N)
        for axes, key in ((by_calls, "reward_calls"), (by_seconds, "seconds")):
            _curves(axes, mine, key, plan.seeds, color, agent)
        ends = last_of(mine)
        pareto.scatter(
            [row["kl_reference"] for row in ends],
            [row["expected_reward_policy"] for row in ends],
            color=color,
            s=18,
            label=agent,
            zorder=3,
        )
    ebm, _ = problem.make()
    pareto.plot(*frontier(ebm), color="0.4", linewidth=1.2, label="exact frontier")
    pareto.set(xlabel="KL(policy, reference) (nats)", ylabel="E[R]", title="Reward against KL")
    for axes, label in ((by_calls, "responses scored"), (by_seconds, "trained seconds")):
        axes.set(yscale="log", xlabel=label, ylabel="exact KL(policy, target) (nats)")
        axes.grid(alpha=0.3)
    by_calls.set_title(f"{problem.label}, beta = {problem.beta:g}: one line a seed")
    pareto.legend(fontsize=7)
    return figure


def _curves(
    axes: Axes,
    rows: Rows,
    key: str,
    seeds: Sequence[int],
    color: tuple[float, float, float, float],
    label: str,
) -> None:
    for i, seed in enumerate(seeds):
        line = [row for row in rows if row["seed"] == seed]
        values = [row["kl_policy_target"] for row in line]
        shown = [max(v, FLOOR) if math.isfinite(v) else math.nan for v in values]
        axes.plot(
            [row[key] for row in line],
            shown,
            color=color,
            linewidth=1.1,
            label=label if i == 0 else None,
        )
