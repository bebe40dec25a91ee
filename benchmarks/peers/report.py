"""Tables, pictures and the section's README, from the rows of all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.peers.contender import Contender
from benchmarks.peers.crossings import (
    KL,
    crossed,
    crossing,
    figure,
    kl_at,
    look_at,
    runs_of,
    speed,
    winner,
)
from benchmarks.peers.watch import Rows
from rl_ebm.studies.bench_rows import bracket, samples_of

LEVELS = (0.1, 0.01)
INTRO = """# Our methods and other libraries

The same EBMs, the same machine, the same cores, one process after the other, each method with the
settings that its own library recommends and with one thread or all, whichever made more updates in
a trial (column "threads"). Every policy is verified by the same code: the exact
KL(policy, target), in nats, over all sequences; where nobody can list them an estimate from exact
samples, with its 95% interval in brackets. The stopwatch stands still meanwhile.
Imports are not counted; compilation is, and the column "first update" shows it. Seconds and calls
to a KL are those of the first look that found it, so a little late: of 50 looks no two are further
apart than a twenty-fifth of the run.

    pip install '.[peers-sb3]'          # and peers-torchgfn, peers-gfnx, peers-trl: each may have
    python -m benchmarks.peers          # an interpreter of its own, --python torchgfn=PATH
    python -m benchmarks.peers --quick  # a few seconds each: only to see that it works

"Cannot" is no measure of speed: a method whose fixed point is not the EBM does not come there,
however long it runs. Its fixed point stands beside its settings. A method whose learning rate falls
to zero at the end of its time is best there, so ours also run with less time: "30 s" in a name.
"""


def table(rows: Rows, contenders: Sequence[Contender], notes: dict[str, str], limit: float) -> str:
    """Markdown, one line for each contender.

    Args:
        notes: why somebody has no rows.
        limit: seconds of the longest runs; the first column of KLs is at a third of it.
    """
    head = [
        "method",
        "network",
        "weights",
        "threads",
        "fixed point",
        f"KL after {limit / 3:.0f} s",
        f"KL after {limit:.0f} s",
        *(f"seconds to KL < {level:g}" for level in LEVELS),
        *(f"reward calls to KL < {level:g}" for level in LEVELS),
        "updates/s",
        "first update, s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for contender in contenders:
        runs = runs_of(rows, contender.name)
        if not runs:
            continue
        cells = [
            contender.name,
            contender.network,
            f"{runs[0][0]['parameters']:,}",
            ", ".join(str(t) for t in sorted({run[0]["threads"] for run in runs})),
            "p*" if contender.ends_at_target else "another",
            kl_at([look_at(run, limit / 3) for run in runs]),
            kl_at([look_at(run, limit) for run in runs]),
            *(crossing(runs, level, "seconds", contender) for level in LEVELS),
            *(crossing(runs, level, "reward_calls", contender) for level in LEVELS),
            figure([speed(run) for run in runs]),
            figure([run[0]["seconds"] for run in runs]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    absent = [f"- {c.name}: {notes[c.name]}" for c in contenders if c.name in notes]
    return "\n".join(lines) + ("\n\nNot run:\n\n" + "\n".join(absent) if absent else "")


def remarks(rows: Rows) -> str:
    """Who was first, and over how many runs all this is."""
    said = []
    for level in LEVELS:
        for column, unit in (("seconds", "s"), ("reward_calls", "reward calls")):
            found = winner(rows, level, column)
            if found is not None:
                said.append(
                    f"First below {level:g} by {column.replace('_', ' ')}: {found[0]} "
                    f"({figure([found[1]])} {unit})."
                )
    samples = samples_of(rows)
    if not said:
        said = [f"Nobody came below a KL of {LEVELS[0]:g}."]
        names = {row["contender"] for row in rows}
        perhaps = [crossed(r, LEVELS[0], KL)[0] for name in names for r in runs_of(rows, name)]
        if samples is not None and any(kl is not None for kl in perhaps):
            said = [f"Who was first below {LEVELS[0]:g}, if anybody, is left open."]
    runs = {len(runs_of(rows, name)) for name in {row["contender"] for row in rows}}
    several = "mean ± half-width of the 95% interval (Student's t)"
    if runs == {1}:
        said.append("One run each, so no interval.")
    elif len(runs) == 1:
        said.append(f"{max(runs)} runs each: {several}.")
    else:
        said.append(f"{min(runs)} to {max(runs)} runs each: {several} where there are several.")
    if samples is not None:
        said.append(
            f"Every KL is an estimate from {samples:,} exact samples of target and policy each. In "
            "brackets, from the mean of the runs' lower ends to that of their upper ones, is what "
            "other samples of these policies would change: each look has a 95% interval of its own "
            "(asymptotic; an open end is infinite), ± is about runs alone. A time to a KL is from "
            "the first look that may be below it, by its lower end, to the first that is, by its "
            "upper end; one number where they are the same."
        )
    return " ".join(said)


def settings(rows: Rows, contenders: Sequence[Contender]) -> str:
    """A list: what each ran with, where that is recommended, and what it converges to."""
    lines = []
    for contender in contenders:
        mine = [row for row in rows if row["contender"] == contender.name]
        if not mine:
            continue
        end = (
            "Fixed point: p*."
            if contender.ends_at_target
            else f"Cannot reach p*: {contender.fixed_point}."
        )
        lines.append(
            f"- **{contender.name}** ({mine[0]['version']}): {contender.settings}. "
            f"From: {contender.source}. {end}"
        )
    return "\n".join(lines)


def picture(rows: Rows, contenders: Sequence[Contender], title: str) -> Figure:
    """KL(policy, target) against seconds, both on logarithmic axes, a line for each run."""
    shown = [c for c in contenders if runs_of(rows, c.name)]
    sheet = Figure(figsize=(11, 6), layout="constrained")
    axes = sheet.subplots()
    packages = list(dict.fromkeys(c.package for c in shown))
    styles = ("-", "--", ":", "-.")
    for contender in shown:
        i = packages.index(contender.package)
        j = [c.name for c in shown if c.package == contender.package].index(contender.name)
        for k, run in enumerate(runs_of(rows, contender.name)):
            axes.plot(
                [max(row["seconds"], 1e-3) for row in run],
                [max(row[KL], 1e-9) for row in run],
                color=f"C{i}",
                alpha=1 - 0.12 * (j // len(styles) % 6),
                linestyle=styles[j % len(styles)],
                linewidth=1 + 0.6 * (j // len(styles) % 3),
                label=contender.name if k == 0 else None,
            )
            if samples_of(run) is not None:
                low, high = zip(*(bracket(row, KL) for row in run), strict=True)
                axes.fill_between(
                    [max(row["seconds"], 1e-3) for row in run],
                    [max(x, 1e-9) for x in low],
                    [x if x < math.inf else math.nan for x in high],
                    color=f"C{i}",
                    alpha=0.15,
                    linewidth=0,
                )
    for level in LEVELS:
        axes.axhline(level, color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="trained seconds",
        ylabel="exact KL(policy, target) (nats)"
        if samples_of(rows) is None
        else "KL(policy, target) (nats), 95% intervals of sampling",
        title=title,
    )
    axes.grid(alpha=0.3)
    sheet.legend(loc="outside right upper", fontsize=8)
    return sheet
