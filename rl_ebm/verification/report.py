"""The verifier's report: what is in it, as JSON and as text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """Bounds on KL(policy, target), nats; see :mod:`rl_ebm.bounds`."""

    prop3: float
    span: float
    occupancy: float


@dataclass(frozen=True)
class Depth:
    """The states of one depth."""

    depth: int
    states: int
    """prefixes with p*(s) > 0"""
    linf: float
    """max |delta|, delta = q - q* centred at each state"""
    mean_kl: float
    """E_{s ~ p*} KL(pi*(.|s), pi(.|s)); over the depths they sum to kl_target_policy"""


@dataclass(frozen=True)
class Prefix:
    """One state at which the policy's logits are far off."""

    prefix: list[int]
    prompt_id: int
    probability_target: float
    """p*(s), of a response to begin so"""
    probability_policy: float
    delta: list[float]
    """delta = q - q* for each action, centred; 0 at actions that p* forbids"""
    kl: float
    """KL(pi*(.|s), pi(.|s))"""


@dataclass(frozen=True)
class Report:
    """How far a policy is from the EBM's exact policy. Nats, and reward units for rewards."""

    mode: str
    num_sequences: int
    log_z: float
    kl_target_policy: float
    """KL(p*, pi)"""
    kl_policy_target: float
    """KL(pi, p*)"""
    tv: float
    js: float
    entropy_target: float
    entropy_policy: float
    expected_reward_target: float
    expected_reward_policy: float
    mass_impossible: float
    """what pi gives to responses with p* = 0"""
    logits_linf: float
    """max over states with p*(s) > 0 of |q* - q|, centred by its mean over allowed actions"""
    logits_span: float
    """max over states with p*(s) > 0 of L_s = max - min of q* - q over allowed actions"""
    log_ratio_span: float
    """max - min over responses of log pi - log p*"""
    bellman_residual_max: float | None
    """max |q - r - V_q(s a)| on raw logits; None unless the policy's logits are values"""
    bellman_residual_mean: float | None
    bounds: Bounds
    per_depth: list[Depth]
    worst_prefixes: list[Prefix]
    per_prompt: list[Report] = field(default_factory=list)
    num_prompts: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite numbers are the strings "Infinity" and "-Infinity"."""
        out: dict[str, Any] = plain(self)
        return out

    def scalars(self) -> dict[str, float]:
        """Everything in the report that is one number, bounds included, by its key."""
        out: dict[str, float] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "num_prompts" and isinstance(value, (int, float)):
                out[f.name] = float(value)
        return out | {f"bounds/{f.name}": getattr(self.bounds, f.name) for f in fields(Bounds)}

    def __str__(self) -> str:
        lines = [
            f"{self.mode}: {self.num_sequences:,} sequences"
            + (f", {self.num_prompts} prompts (means)" if self.num_prompts > 1 else ""),
            f"  log Z                      {self.log_z:14.6f}",
            "",
            f"  KL(target, policy)         {_number(self.kl_target_policy)} nats",
            f"  KL(policy, target)         {_number(self.kl_policy_target)} nats",
            f"    <= occupancy bound       {_number(self.bounds.occupancy)}",
            f"    <= span bound            {_number(self.bounds.span)}",
            f"    <= 2T |q - q*| (Prop. 3) {_number(self.bounds.prop3)}",
            f"  total variation            {_number(self.tv)}",
            f"  Jensen-Shannon             {_number(self.js)} nats",
            f"  mass on impossible         {_number(self.mass_impossible)}",
            "",
            "                                     target         policy",
            f"  entropy             {self.entropy_target:21.6f}{self.entropy_policy:15.6f} nats",
            f"  expected reward     {self.expected_reward_target:21.6f}"
            f"{self.expected_reward_policy:15.6f}",
            "",
            f"  logit error, max           {_number(self.logits_linf)} (span "
            f"{_number(self.logits_span).strip()})",
        ]
        if self.bellman_residual_max is not None and self.bellman_residual_mean is not None:
            lines.append(
                f"  Bellman residual, max      {_number(self.bellman_residual_max)} (mean "
                f"{_number(self.bellman_residual_mean).strip()})"
            )
        lines += ["", "  depth   states   max logit error   E KL(target, policy)"]
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


def _number(x: float) -> str:
    x += 0.0  # -0 is 0
    return f"{x:12.6f}" if x == 0 or 1e-4 <= abs(x) < 1e5 else f"{x:12.3e}"


def plain(x: Any) -> Any:
    """A report, or a part of it, as JSON has it."""
    if isinstance(x, float):
        assert not math.isnan(x), "a report never holds nan"
        return x + 0.0 if math.isfinite(x) else ("Infinity" if x > 0 else "-Infinity")
    if isinstance(x, (list, tuple)):
        return [plain(item) for item in x]
    if hasattr(x, "__dataclass_fields__"):
        # Without prompts there is no per_prompt; their number is told where they are not there.
        some = bool(getattr(x, "per_prompt", False))
        told = not some and getattr(x, "num_prompts", 1) > 1
        optional = {"per_prompt": some, "num_prompts": told}
        kept = [f.name for f in fields(x) if optional.get(f.name, True)]
        return {name: plain(getattr(x, name)) for name in kept}
    return x
