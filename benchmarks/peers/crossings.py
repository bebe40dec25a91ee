"""What the rows of runs say: where they end, and when they came below a KL."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.contender import Contender
from benchmarks.peers.watch import Rows
from rl_ebm.studies.bench_rows import bracket, bracket_of_mean, samples_of
from rl_ebm.studies.seeds import between, interval

KL = "kl_policy_target"


def runs_of(rows: Rows, contender: str) -> list[Rows]:
    """The rows of each seed of a contender, as they were taken."""
    mine = [row for row in rows if row["contender"] == contender]
    return [[r for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})]


def crossed(run: Rows, level: float, column: str) -> tuple[float | None, float | None]:
    """``column`` at the first looks whose KL may be, and is, below ``level``; None where none is.

    What is exact is below where it may be. Of an estimate the lower end of its interval tells the
    one and the upper end the other: in between nobody knows.
    """
    ends = [(row[column], *bracket(row, KL)) for row in run]
    may = next((value for value, low, _ in ends if low < level), None)
    is_so = next((value for value, _, high in ends if high < level), None)
    return may, is_so


def look_at(run: Rows, seconds: float) -> dict[str, Any]:
    """The look nearest to a time; the last one of a run that was shorter."""
    return min(run, key=lambda row: abs(row["seconds"] - seconds))


def kl_at(looks: Rows) -> str:
    """A table cell: KL(policy, target) of one look at each run.

    In brackets, of estimates, what other samples of these policies would change.
    """
    told = figure([row[KL] for row in looks])
    if samples_of(looks) is None:
        return told
    ends = bracket_of_mean(looks, KL)
    return between(*ends, looks[0][KL]) if len(looks) == 1 else f"{told} {between(*ends)}"


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
    speed. Where estimates leave a time open its two ends are given.
    """
    pairs = [crossed(run, level, column) for run in runs]
    found = [(may, is_so) for may, is_so in pairs if may is not None and is_so is not None]
    perhaps = [may for may, _ in pairs if may is not None]
    if not found:
        if perhaps:
            return f"undecided, not before {figure(perhaps)}"
        return "not reached" if contender.ends_at_target else "cannot"
    share = "" if len(found) == len(runs) else f" ({len(found)} of {len(runs)} runs)"
    first, last = ([pair[i] for pair in found] for i in (0, 1))
    return (figure(last) if first == last else f"{figure(first)} to {figure(last)}") + share


def winner(rows: Rows, level: float, column: str) -> tuple[str, float] | None:
    """Whose median over its runs is smallest, of those whose every run came below a KL.

    Nobody's where estimates leave it open: where another's may be smaller.
    """
    found: dict[str, float] = {}
    perhaps: dict[str, float] = {}
    for name in dict.fromkeys(row["contender"] for row in rows):
        pairs = [crossed(run, level, column) for run in runs_of(rows, name)]
        for medians, values in zip((perhaps, found), zip(*pairs, strict=True), strict=True):
            reached = [value for value in values if value is not None]
            if len(reached) == len(values):
                medians[name] = statistics.median(reached)
    if not found:
        return None
    best, value = min(found.items(), key=lambda item: item[1])
    if any(name != best and may < value for name, may in perhaps.items()):
        return None
    return best, value
