"""Where the runs of a tuning ended, kept in one file: another day goes on from there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from benchmarks.readme.points import Point
from rl_ebm.files import RunError
from rl_ebm.studies.bench_rows import RANKED, Rows
from rl_ebm.training.metrics_csv import read_rows

CALLS = "calls"
"""column: responses that a run could score"""
Tried = dict[Point, Rows]
"""where the runs of each point ended; infinitely far where one failed"""


def flat(tried: dict[str, Tried], calls: int) -> Rows:
    """Where all runs ended, with the settings of each."""
    return [
        {CALLS: calls, **point.told(), **row}
        for points in tried.values()
        for point, rows in points.items()
        for row in rows
    ]


def read_tried(path: Path, calls: int | None = None) -> tuple[Rows, dict[str, Tried]]:
    """The runs of a tuning, all of them and by agent and point.

    Args:
        calls: responses that each could score; None for any number.

    Raises:
        RunError: there is no such file, it is no tuning's, or one of other budgets.
    """
    rows: Rows = []
    tried: dict[str, Tried] = {}
    try:
        for text in read_rows(path)[1]:
            row = {name: _value(cell) for name, cell in text.items() if cell}
            rate, batch = float(row.pop("lr")), int(row.pop("batch_size"))
            point = Point(rate, batch, row.pop("explore", None), row.pop("replay", None))
            budget = row.pop(CALLS)
            if calls not in (None, budget):
                raise RunError(
                    f"{path} has runs of {budget:,} calls, where {calls:,} are asked for: give "
                    f"another --results, or --calls {budget}"
                )
            float(row[RANKED])
            rows.append(row)
            tried.setdefault(row["agent"], {}).setdefault(point, []).append(row)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: python -m benchmarks.readme.tune writes it") from None
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} is no file of a tuning ({error})") from None
    if not rows:
        raise RunError(f"{path} is empty: python -m benchmarks.readme.tune writes it")
    return rows, tried


def _value(cell: str) -> str | int | float:
    """A cell as the number that it is, if it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(cell)
    return cell
