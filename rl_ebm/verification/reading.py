"""What all reports and the documentation are made of, from the table of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_ebm.verification.entry import Figure
from rl_ebm.verification.figures import FIGURES, Bounds, Figures
from rl_ebm.verification.parts import plain


def by_key(report: Figures[Any]) -> dict[str, Any]:
    """Every figure that a report of its form has, by its key; the bounds as ``bounds/...``."""
    found = {}
    for figure in FIGURES:
        if getattr(figure, report.form) is not None:
            group, _, name = figure.key.rpartition("/")
            found[figure.key] = getattr(report.bounds if group else report, name)
    return found


def nested(report: Figures[Any]) -> dict[str, Any]:
    """The same as JSON has it: the bounds in an object of their own."""
    return {key: plain(x) for key, x in _grouped(by_key(report)).items()}


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of :class:`Figures`, from values by key."""
    found = _grouped(values)
    return found | {"bounds": Bounds(**found["bounds"])}


def joined(reports: Sequence[Figures[Any]]) -> dict[str, Any]:
    """The figures of several prompts' reports in one, by key."""
    columns = [by_key(report) for report in reports]
    return {f.key: f.joined([c[f.key] for c in columns]) for f in FIGURES if f.key in columns[0]}


def as_read() -> list[Figure]:
    """The table with the bounds behind what they bound, the tightest first."""
    found = []
    for figure in FIGURES:
        if not figure.bounds:
            below = [f for f in reversed(FIGURES) if f.bounds == figure.key]
            found += [figure, *below]
    return found


def markdown() -> str:
    """The table as the documentation has it."""
    lines = [
        "| key in `report.json` | figure | unit | prompts | what it is |",
        "|---|---|---|---|---|",
    ]
    for f in as_read():
        told = f.meaning + ("; may be infinite" if f.infinite else "")
        told += "; from samples alone" if f.exact is None else ""
        told += "; at every prefix alone" if f.sampled is None else ""
        key = f.key.replace("/", ".")
        cells = (f"`{key}`", f.label, f.unit, f.prompts, told)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """With ``bounds/...`` in a mapping of its own, the last."""
    own = {key: x for key, x in values.items() if "/" not in key}
    return own | {"bounds": {key[7:]: x for key, x in values.items() if "/" in key}}
