"""What the rows of runs say: where they end, and when they came below a KL."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.peers.contender import Contender
from benchmarks.peers.watch import Rows
from rl_ebm.studies.seeds import interval

KL = "kl_policy_target"


def runs_of(rows: Rows, contender: str) -> list[Rows]:
    """The rows of each seed of a contender, as they were taken."""
    mine = [row for row in rows if row["contender"] == contender]
    return [[r for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]


def first_below(run: Rows, level: float, column: str) -> float | None:
    """``column`` at the first look that found a KL(policy, target) below ``level``."""
    return next((row[column] for row in run if row[KL] < level), None)


def at(run: Rows, seconds: float) -> float:
    """KL(policy, target) at the look nearest to a time; the last one of a run that was shorter."""
    return min(run, key=lambda row: abs(row["seconds"] - seconds))[KL]


def speed(run: Rows) -> float:
    """Updates a second, those before the first look (compilation) left out where others follow."""
    first, last = run[0], run[-1]
    if len(run) == 1 or last["seconds"] == first["seconds"]:
        return last["updates"] / max(last["seconds"], 1e-9)
    return (last["updates"] - first["updates"]) / (last["seconds"] - first["seconds"])


def figure(values: Sequence[float]) -> str:
    """A number, or the mean and 95% interval of several."""
    if len(values) > 1:
        return interval([float(value) for value in values])
    value = values[0]
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def crossing(runs: Sequence[Rows], level: float, column: str, contender: Contender) -> str:
    """A table cell: ``column`` where the runs came below a KL.

    One whose fixed point is elsewhere and that did not come there cannot, which is no question of
    speed.
    """
    found = [value for run in runs if (value := first_below(run, level, column)) is not None]
    if not found:
        return "not reached" if contender.ends_at_target else "cannot"
    share = "" if len(found) == len(runs) else f" ({len(found)} of {len(runs)} runs)"
    return figure(found) + share


def winner(rows: Rows, level: float, column: str) -> tuple[str, float] | None:
    """Whose median over its runs is smallest, of those whose every run came below a KL."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(row["contender"] for row in rows):
        values = [first_below(run, level, column) for run in runs_of(rows, name)]
        reached = [value for value in values if value is not None]
        if len(reached) == len(values):
            found[name] = statistics.median(reached)
    return min(found.items(), key=lambda item: item[1]) if found else None
