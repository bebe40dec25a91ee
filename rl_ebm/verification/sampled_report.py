"""The report of a verification from samples: an interval for everything that is an estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rl_ebm.messages.words import count_text
from rl_ebm.statistics.interval import Interval, average
from rl_ebm.verification.report import Report, plain


@dataclass(frozen=True)
class SampledBounds:
    """Bounds on KL(policy, target): the occupancy bound is estimated, the others cannot be.

    They need the largest error of all states; what was visited bounds that from below alone.
    """

    prop3: Interval
    span: Interval
    occupancy: Interval


@dataclass(frozen=True)
class SampledDepth:
    """The states that were visited at one depth by samples of the target."""

    depth: int
    states: int
    """visits"""
    linf: float
    """the largest max |delta| of a visited state"""
    mean_kl: Interval
    """E_{s ~ p*} KL(pi*(.|s), pi(.|s))"""


@dataclass(frozen=True)
class SampledPrefix:
    """A visited state at which the policy's logits are far off."""

    prefix: list[int]
    prompt_id: int
    log_probability_target: float
    """log p*(s), exact"""
    log_probability_policy: float
    actions: list[int]
    """those with the largest errors"""
    delta: list[float]
    """q - q* at these actions, centred over the allowed ones"""
    kl: float
    """KL(pi*(.|s), pi(.|s))"""


@dataclass(frozen=True)
class SampledReport:
    """How far a policy is from the exact one, from exact samples of both.

    Log-probabilities, and the divergence at every visited state, are exact; expectations over
    states are estimated, each with its interval. The figures are those of
    :class:`rl_ebm.verification.report.Report`, in nats and reward units.
    """

    mode: str
    """always ``"sampled"``"""
    num_samples: int
    """of the target, and as many of the policy, for each prompt"""
    num_sequences: int
    log_z: float
    """exact"""
    kl_target_policy: Interval
    kl_policy_target: Interval
    tv: Interval
    js: Interval
    entropy_target: Interval
    entropy_policy: Interval
    expected_reward_target: Interval
    expected_reward_policy: Interval
    mass_impossible: Interval
    logits_linf: Interval
    """of the states that were visited: a lower end of that of all states"""
    logits_linf_target: Interval
    """the mean over the states that samples of the target visit of each one's largest error"""
    logits_linf_policy: Interval
    """the same, of samples of the policy; of states that the target never reaches none"""
    logits_span: Interval
    log_ratio_span: Interval
    bellman_residual_max: Interval | None
    """of visited transitions; None unless the policy's logits are values"""
    bellman_residual_mean: Interval | None
    """over the transitions of samples of the target"""
    bellman_residual_mean_policy: Interval | None
    """over those of samples of the policy"""
    bounds: SampledBounds
    per_depth: list[SampledDepth]
    worst_prefixes: list[SampledPrefix]
    warnings: list[str] = field(default_factory=list)
    """why an interval has no end on a side where one was looked for"""
    per_prompt: list[SampledReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite numbers are the strings "Infinity" and "-Infinity"."""
        out: dict[str, Any] = plain(self)
        return out

    def scalars(self) -> dict[str, float]:
        """The estimates, by their keys."""
        out = {"log_z": self.log_z}
        for name, value in self.intervals().items():
            out[name] = value.estimate
        return out

    def intervals(self) -> dict[str, Interval]:
        """Everything that is estimated, by its key."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        bounds = {f"bounds/{f.name}": getattr(self.bounds, f.name) for f in fields(SampledBounds)}
        return {k: x for k, x in (found | bounds).items() if isinstance(x, Interval)}

    def __str__(self) -> str:
        lines = [
            f"{self.mode}: {self.num_samples:,} samples of target and policy each, of "
            f"{count_text(self.num_sequences)} sequences"
            + (f", {len(self.per_prompt)} prompts (means)" if self.per_prompt else ""),
            f"  {'log Z':25s} {self.log_z:.6f} exact",
            *(f"  {_NAMES.get(name, name):25s} {x}" for name, x in self.intervals().items()),
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

_NAMES = {
    "kl_target_policy": "KL(target, policy)",
    "kl_policy_target": "KL(policy, target)",
    "tv": "total variation",
    "js": "Jensen-Shannon",
    "mass_impossible": "mass on impossible",
    "logits_linf": "logit error, max visited",
    "logits_linf_target": "logit error, mean, target",
    "logits_linf_policy": "logit error, mean, policy",
    "logits_span": "logit span, max visited",
    "bellman_residual_max": "Bellman residual, max",
    "bellman_residual_mean": "Bellman residual, target",
    "bellman_residual_mean_policy": "Bellman residual, policy",
}


def _some(depths: Sequence[SampledDepth]) -> list[SampledDepth]:
    """All depths, or some twenty of many."""
    step = max(1, len(depths) // 20)
    return [d for d in depths if d.depth % step == 0 or d.depth == len(depths) - 1]


def combine_sampled(reports: Sequence[SampledReport]) -> SampledReport:
    """One report for several prompts: the largest maxima, means of the rest."""
    figures: dict[str, Any] = {}
    for f in fields(SampledReport):
        column = [getattr(report, f.name) for report in reports]
        first = column[0]
        if f.name == "bounds":
            figures[f.name] = SampledBounds(
                *(average([getattr(b, g.name) for b in column]) for g in fields(SampledBounds))
            )
        elif f.name == "per_depth":
            figures[f.name] = [_combine_depth(depths) for depths in zip(*column, strict=True)]
        elif f.name == "worst_prefixes":
            found = [prefix for prefixes in column for prefix in prefixes]
            worst = sorted(found, key=lambda p: max(map(abs, p.delta)), reverse=True)
            figures[f.name] = worst[: len(first)]
        elif f.name == "per_prompt":
            figures[f.name] = list(reports)
        elif f.name == "warnings":
            figures[f.name] = [
                f"prompt {i}: {text}" for i, texts in enumerate(column) for text in texts
            ]
        elif f.name == "log_z":
            figures[f.name] = math.fsum(column) / len(column)
        elif isinstance(first, Interval):
            largest = f.name.endswith(("_linf", "_span", "_max"))
            figures[f.name] = max(column, key=lambda x: x.low) if largest else average(column)
        else:
            figures[f.name] = first
    return SampledReport(**figures)


def _combine_depth(depths: Sequence[SampledDepth]) -> SampledDepth:
    return SampledDepth(
        depths[0].depth,
        sum(d.states for d in depths),
        max(d.linf for d in depths),
        average([d.mean_kl for d in depths]),
    )
