"""What a report says of single depths and states, and how any part of one is written as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from rl_ebm.messages.numerals import as_json
from rl_ebm.statistics.interval import Interval


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


def plain(x: Any) -> Any:
    """A part of a report as JSON has it: infinite numbers are "Infinity" and "-Infinity"."""
    if isinstance(x, float):
        assert not math.isnan(x), "a report never holds nan"
        return as_json(x + 0.0)  # not -0
    if isinstance(x, (list, tuple)):
        return [plain(item) for item in x]
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if hasattr(x, "to_dict") and not isinstance(x, Interval):
        return x.to_dict()
    if hasattr(x, "__dataclass_fields__"):
        return {f.name: plain(getattr(x, f.name)) for f in fields(x)}
    return x
