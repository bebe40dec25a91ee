"""What an entry of the table of figures has: see :mod:`rl_ebm.verification.figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple

from torch import Tensor

from rl_ebm.statistics.expectations import Found
from rl_ebm.statistics.interval import Interval, average
from rl_ebm.verification.every_prefix import Accumulator, Sum
from rl_ebm.verification.laws import Laws

NATS, REWARD, SHARE, NUMBER = "nats", "reward units", "probability", "number"
Exact = Sum | Callable[[Accumulator], Tensor | None]
"""of every prompt, (P,); None where the policy has none"""
Sampled = Callable[[Laws], Found | Interval | float | None]
"""an interval, with why an end is open; a number where it is exact; None where there is none"""


class Row(NamedTuple):
    """Where a figure stands in the text of an exact report."""

    place: Literal["top", "distance", "bound", "target", "policy", "error", "aside"]
    """a line at the top, among the distances, or under the one it bounds; a column of the table
    of both laws; a line among the errors, or in brackets behind the one before"""
    name: str = ""
    """"" for the figure's label"""


@dataclass(frozen=True)
class Figure:
    """An entry of the table.

    Attributes:
        label: its name.
        unit: of what it is.
        meaning: a sentence for the documentation.
        exact: how it is read off every prefix; None for what only samples tell.
        sampled: how it is read off samples; None for what they do not tell.
        prompts: how those of several prompts combine.
        infinite: whether it may be.
        row: its place in the text of an exact report; None where it has none.
        told: its name in the text of a sampled one; "" for the label.
        bounds: the key of the figure that it is an upper bound on.
        benched: whether it is a column of a benchmark's ``results.csv``.
        key: its name in reports, JSON and tags.
    """

    label: str
    unit: str
    meaning: str
    exact: Exact | None = None
    sampled: Sampled | None = None
    prompts: Literal["mean", "max"] = "mean"
    infinite: bool = False
    row: Row | None = None
    told: str = ""
    bounds: str = ""
    benched: bool = False
    key: str = ""

    def read(self, tree: Accumulator) -> Tensor | None:
        """Its exact value for every prompt, (P,)."""
        if isinstance(self.exact, Sum):
            return self.exact.finish(tree.sums[self.key], tree)
        return None if self.exact is None else self.exact(tree)

    def joined(self, column: Sequence[Any]) -> Any:
        """One value for several prompts."""
        largest = self.prompts == "max"
        if column[0] is None:
            return None
        if isinstance(column[0], Interval):
            return max(column, key=lambda x: x.low) if largest else average(column)
        return max(column) if largest else fmean(column)


def entry(
    label: str,
    unit: str,
    meaning: str,
    *,
    exact: Exact | None = None,
    sampled: Sampled | None = None,
    prompts: Literal["mean", "max"] = "mean",
    infinite: bool = False,
    row: Row | None = None,
    told: str = "",
    bounds: str = "",
    benched: bool = False,
) -> Any:
    """A field of the table; see :class:`Figure`. None in a report of a form that it has not."""
    figure = Figure(
        label, unit, meaning, exact, sampled, prompts, infinite, row, told, bounds, benched
    )
    return field(default=None, metadata={"figure": figure})
