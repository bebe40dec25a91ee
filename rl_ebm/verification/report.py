"""The report of a verification at every prefix, as JSON and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any

from rl_ebm.verification.entry import NATS, Figure
from rl_ebm.verification.every_prefix import WORST, Accumulator
from rl_ebm.verification.figures import FIGURES, Figures
from rl_ebm.verification.parts import Depth, Prefix, plain
from rl_ebm.verification.reading import arguments, as_read, by_key, joined, nested


@dataclass(frozen=True, kw_only=True)
class Report(Figures[float]):
    """How far a policy is from the EBM's exact policy. Nats, and reward units for rewards.

    Its figures are those of :mod:`rl_ebm.verification.figures`.
    """

    form = "exact"

    mode: str
    num_sequences: int
    per_depth: list[Depth]
    worst_prefixes: list[Prefix]
    per_prompt: list[Report] = field(default_factory=list)
    num_prompts: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite numbers are the strings "Infinity" and "-Infinity"."""
        out = {"mode": self.mode, "num_sequences": self.num_sequences, **nested(self)}
        out |= {"per_depth": plain(self.per_depth), "worst_prefixes": plain(self.worst_prefixes)}
        # Without prompts there is no per_prompt; their number is told where they are not there.
        if self.per_prompt:
            out["per_prompt"] = plain(self.per_prompt)
        elif self.num_prompts > 1:
            out["num_prompts"] = self.num_prompts
        return out

    def scalars(self) -> dict[str, float]:
        """Everything in the report that is one number, bounds included, by its key."""
        found = {"num_sequences": float(self.num_sequences), **by_key(self)}
        return {key: float(x) for key, x in found.items() if x is not None}

    def __str__(self) -> str:
        lines = [
            f"{self.mode}: {self.num_sequences:,} sequences"
            + (f", {self.num_prompts} prompts (means)" if self.num_prompts > 1 else ""),
            *_lines(by_key(self)),
            "",
            "  depth   states   max logit error   E KL(target, policy)",
        ]
        lines += [
            f"  {d.depth:5d}{d.states:9d}{_number(d.linf):>18}{_number(d.mean_kl):>23}"
            for d in self.per_depth
        ]
        lines += [
            "",
            "  worst prefixes (by logit error)          p target     p policy   max error",
        ]
        for w in self.worst_prefixes[:5]:
            name = " ".join(map(str, w.prefix)) or "(empty)"
            if self.num_prompts > 1:
                name = f"prompt {w.prompt_id}: {name}"
            error = max((abs(x) for x in w.delta), default=0.0)
            lines.append(
                f"  {name:36s}{_number(w.probability_target)}"
                f"{_number(w.probability_policy)}{_number(error)}"
            )
        return "\n".join(lines)


def reports(tree: Accumulator) -> list[Report]:
    """The report of every prompt, once all blocks of a walk were added."""
    columns = {f.key: f.read(tree) for f in FIGURES if f.exact is not None}
    lists = {key: None if x is None else x.tolist() for key, x in columns.items()}
    return [
        Report(
            mode=tree.solution.mode,
            num_sequences=tree.space.num_sequences,
            per_depth=depths,
            worst_prefixes=worst,
            **arguments({key: None if x is None else x[i] for key, x in lists.items()}),
        )
        for i, (depths, worst) in enumerate(zip(tree.depths(), tree.worst_prefixes(), strict=True))
    ]


def combine(parts: Sequence[Report]) -> Report:
    """One report for several prompts: maxima of errors and spans, means of the rest."""
    named = chain.from_iterable(part.worst_prefixes for part in parts)
    return Report(
        mode=parts[0].mode,
        num_sequences=parts[0].num_sequences,
        per_depth=[_combine_depth(d) for d in zip(*(p.per_depth for p in parts), strict=True)],
        worst_prefixes=sorted(named, key=_error, reverse=True)[:WORST],
        per_prompt=list(parts),
        num_prompts=len(parts),
        **arguments(joined(parts)),
    )


def _combine_depth(depths: Sequence[Depth]) -> Depth:
    return replace(
        depths[0],
        states=sum(d.states for d in depths),
        linf=max(d.linf for d in depths),
        mean_kl=fmean(d.mean_kl for d in depths),
    )


def _error(prefix: Prefix) -> float:
    return max(abs(x) for x in prefix.delta)


# Text ---------------------------------------------------------------------------------------------


def _lines(values: dict[str, float | None]) -> list[str]:
    """The figures that have a row, in their four parts."""
    shown = [(f, x) for f in as_read() if f.row and (x := values.get(f.key)) is not None]
    parts: dict[str, list[str]] = {"top": [], "distance": [], "table": [], "error": []}
    parts["table"].append("                                     target         policy")
    columns: dict[str, float] = {}
    for figure, x in shown:
        assert figure.row is not None
        place, name = figure.row.place, figure.row.name or figure.label
        if place == "top":
            parts["top"].append(f"  {name:27s}{x:14.6f}")
        elif place == "distance":
            parts["distance"].append(f"  {name:27s}{_number(x)}{_unit(figure)}")
        elif place == "bound":
            parts["distance"].append(f"    {name:25s}{_number(x)}")
        elif place == "target":
            columns[name] = x
        elif place == "policy":
            width = 41 - len(name)
            row = f"  {name}{columns[name]:{width}.6f}{x:15.6f}{_unit(figure)}"
            parts["table"].append(row)
        elif place == "error":
            parts["error"].append(f"  {name:27s}{_number(x)}")
        else:
            parts["error"][-1] += f" ({name} {_number(x).strip()})"
    return [*parts["top"], "", *parts["distance"], "", *parts["table"], "", *parts["error"]]


def _unit(figure: Figure) -> str:
    return " nats" if figure.unit == NATS else ""


def _number(x: float) -> str:
    x += 0.0  # -0 is 0
    return f"{x:12.6f}" if x == 0 or 1e-4 <= abs(x) < 1e5 else f"{x:12.3e}"
