"""The report of a verification from samples: an interval for everything that is an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_ebm.messages.words import count_text
from rl_ebm.statistics.expectations import Found, expectation
from rl_ebm.statistics.interval import Interval, average
from rl_ebm.verification.entry import Figure
from rl_ebm.verification.figures import FIGURES, Figures
from rl_ebm.verification.forms import OverStates
from rl_ebm.verification.laws import Laws
from rl_ebm.verification.parts import SampledDepth, SampledPrefix, plain
from rl_ebm.verification.reading import arguments, as_read, by_key, joined, nested
from rl_ebm.verification.report import Report
from rl_ebm.verification.visits import WORST, Visits


@dataclass(frozen=True, kw_only=True)
class SampledReport(Figures[Interval]):
    """How far a policy is from the exact one, from exact samples of both.

    Log-probabilities, and the divergence at every visited state, are exact; expectations over
    states are estimated, each with its interval. The figures are those of
    :mod:`rl_ebm.verification.figures`, in nats and reward units.
    """

    form = "sampled"

    mode: str
    """always ``"sampled"``"""
    num_samples: int
    """of the target, and as many of the policy, for each prompt"""
    num_sequences: int
    per_depth: list[SampledDepth]
    worst_prefixes: list[SampledPrefix]
    warnings: list[str] = field(default_factory=list)
    """why an interval has no end on a side where one was looked for"""
    per_prompt: list[SampledReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite numbers are the strings "Infinity" and "-Infinity"."""
        names = ("mode", "num_samples", "num_sequences")
        out = {name: getattr(self, name) for name in names} | nested(self)
        for name in ("per_depth", "worst_prefixes", "warnings", "per_prompt"):
            if name != "per_prompt" or self.per_prompt:
                out[name] = plain(getattr(self, name))
        return out

    def scalars(self) -> dict[str, float]:
        """The estimates, by their keys."""
        found = {k: x for k, x in by_key(self).items() if x is not None}
        return {k: x.estimate if isinstance(x, Interval) else x for k, x in found.items()}

    def intervals(self) -> dict[str, Interval]:
        """Everything that is estimated, by its key."""
        return {k: x for k, x in by_key(self).items() if isinstance(x, Interval)}

    def ends(self) -> dict[str, float]:
        """The ends of all intervals, as ``KEY/low`` and ``KEY/high``; infinite where open."""
        found = self.intervals().items()
        return {f"{k}/{end}": getattr(x, end) for k, x in found for end in ("low", "high")}

    def __str__(self) -> str:
        values = by_key(self)
        shown = [(f.told or f.label, x) for f in FIGURES if (x := values.get(f.key)) is not None]
        lines = [
            f"{self.mode}: {self.num_samples:,} samples of target and policy each, of "
            f"{count_text(self.num_sequences)} sequences"
            + (f", {len(self.per_prompt)} prompts (means)" if self.per_prompt else ""),
            *(
                f"  {name:25s} " + (str(x) if isinstance(x, Interval) else f"{x:.6f} exact")
                for name, x in shown
            ),
            *(f"  warning: {text}" for text in self.warnings),
            "",
            "  depth   visits   max logit error   E KL(target, policy)",
            *(
                f"  {d.depth:5d}{d.states:9d}{d.linf:18.4g}   {d.mean_kl}"
                for d in _some(self.per_depth)
            ),
            "",
            "  worst visited prefixes                  log p target  log p policy   max error",
        ]
        for w in self.worst_prefixes[:5]:
            name = " ".join(map(str, w.prefix)) or "(empty)"
            name = name if len(name) <= 36 else "... " + name[-32:]
            lines.append(
                f"  {name:36s}  {w.log_probability_target:13.5g} {w.log_probability_policy:13.5g} "
                f"{max((abs(x) for x in w.delta), default=0.0):11.4g}"
            )
        return "\n".join(lines)


AnyReport = Report | SampledReport
"""what :func:`rl_ebm.verify` gives"""


def report(laws: Laws) -> SampledReport:
    """The report of one prompt."""
    found = {f.key: f.sampled(laws) for f in FIGURES if f.sampled is not None}
    why = {key: x.why for key, x in found.items() if isinstance(x, Found) and x.why}
    values = {key: x.interval if isinstance(x, Found) else x for key, x in found.items()}
    return SampledReport(
        mode="sampled",
        num_samples=len(laws.star.batch),
        num_sequences=laws.space.num_sequences,
        per_depth=_depths(laws),
        worst_prefixes=_merged(*laws.visits),
        warnings=_warnings(why),
        **arguments(values),
    )


def _warnings(why: dict[str, str]) -> list[str]:
    """One sentence for each reason of an open end: means over responses first, as they are read."""
    by_reason: dict[str, list[str]] = {}
    for figure in sorted(as_read(), key=_law):
        if figure.key in why:
            by_reason.setdefault(why[figure.key], []).append(figure.key)
    return [
        f"no end on one side at least for {', '.join(names)}: {reason}"
        for reason, names in by_reason.items()
    ]


def _law(figure: Figure) -> int:
    """Means over states come behind, those of the target first."""
    if not isinstance(figure.sampled, OverStates):
        return 0
    return 1 if figure.sampled.of == "star" else 2


def _depths(laws: Laws) -> list[SampledDepth]:
    (star, mine), law = laws.visits, laws.star
    found = []
    for t in range(laws.space.max_length):
        known = law.error(law.beyond.kl_at[:, t], laws.missing)
        mean_kl = expectation(star.kl_at[:, t], laws.confidence, known).interval
        visits = int((law.batch.lengths > t).sum())
        found.append(SampledDepth(t, visits, max(star.linf[t], mine.linf[t]), mean_kl))
    return found


def _merged(star: Visits, mine: Visits) -> list[SampledPrefix]:
    """The worst prefixes that either visits, each once."""
    worst = sorted([*star.worst, *mine.worst], key=lambda x: x[:2], reverse=True)
    found: dict[tuple[int, ...], SampledPrefix] = {}
    for _, _, prefix in worst:
        found.setdefault(tuple(prefix.prefix), prefix)
    return list(found.values())[:WORST]


def _some(depths: Sequence[SampledDepth]) -> list[SampledDepth]:
    """All depths, or some twenty of many."""
    step = max(1, len(depths) // 20)
    return [d for d in depths if d.depth % step == 0 or d.depth == len(depths) - 1]


def combine_sampled(reports: Sequence[SampledReport]) -> SampledReport:
    """One report for several prompts: the largest maxima, means of the rest."""
    first = reports[0]
    named = [prefix for r in reports for prefix in r.worst_prefixes]
    worst = sorted(named, key=lambda p: max(map(abs, p.delta)), reverse=True)
    return SampledReport(
        mode=first.mode,
        num_samples=first.num_samples,
        num_sequences=first.num_sequences,
        per_depth=[_combine_depth(d) for d in zip(*(r.per_depth for r in reports), strict=True)],
        worst_prefixes=worst[: len(first.worst_prefixes)],
        warnings=[f"prompt {i}: {text}" for i, r in enumerate(reports) for text in r.warnings],
        per_prompt=list(reports),
        **arguments(joined(reports)),
    )


def _combine_depth(depths: Sequence[SampledDepth]) -> SampledDepth:
    return SampledDepth(
        depths[0].depth,
        sum(d.states for d in depths),
        max(d.linf for d in depths),
        average([d.mean_kl for d in depths]),
    )
