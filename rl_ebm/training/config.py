"""When a run ends, and how often it is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rl_ebm.messages.arguments import Int, Number, Whole, is_number, shown, whole
from rl_ebm.statistics.interval import check_samples

UNDRAWN = 4096
"""responses that a step counts for where an agent draws none"""
LOG_SECONDS = 10.0
"""after so long without a row of metrics the next step is logged"""


@dataclass(frozen=True)
class TrainConfig:
    """When a run ends, and how often it is looked at.

    Without an end of its own it gets that of :func:`rl_ebm.train`.
    """

    steps: Int | None = None
    """gradient steps at which the run ends; None for no limit"""
    seconds: Number | None = None
    """trained seconds at which the run ends; None for no limit"""
    log_every: Int = 20
    """steps between two rows of metrics; the first step, the last, and after 10 seconds without a
    row one more are logged as well"""
    eval_every: Number = 5.0
    """seconds between two exact verifications, at least; never more than a tenth of the time"""
    checkpoint_every: Number = 5.0
    """seconds between two checkpoints, at least; longer where saving a large network would take
    more than a tenth of the time"""
    samples: Int | None = None
    """responses of target and policy each that a verification on the way draws where prefixes are
    too many to be listed; None for 100, fewer of long ones"""
    responses: Int | None = None
    """responses drawn and scored, or looked up, at which the run ends, with the step that reaches
    them; an agent that draws none counts 4,096 a step. None for no limit"""

    def __post_init__(self) -> None:
        if self.responses is not None:
            responses = whole("responses", self.responses)
            if not 1 <= responses < 2**63:
                raise ValueError(f"responses must be in [1, 2**63), got {responses}")
            object.__setattr__(self, "responses", responses)
        every = whole("log_every", self.log_every)
        for name, value in (*check_limits(self.steps, self.seconds).items(), ("log_every", every)):
            object.__setattr__(self, name, value)
        if every < 1:
            raise ValueError(f"log_every must be >= 1, got {every}")
        if every >= 2**63:
            raise ValueError(f"log_every must be below 2**63, got {shown(every)}")
        for name in ("eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be > 0 seconds, got {shown(value)}")
            object.__setattr__(self, name, float(value))
        if self.samples is not None:
            samples = check_samples(self.samples, 2, ": one has no spread")
            object.__setattr__(self, "samples", samples)

    @property
    def endless(self) -> bool:
        """Whether it has no limit."""
        return self.steps is None and self.seconds is None and self.responses is None


def check_limits(steps: Whole | None, seconds: Number | None) -> dict[str, Any]:
    """The limits of a run as Python's own numbers; None for no limit.

    Raises:
        ValueError: steps that are no integer >= 0, or seconds that are no finite number >= 0.
    """
    if steps is not None:
        steps = whole("steps", steps)
        if steps >= 2**63:
            raise ValueError(f"steps must be below 2**63, got {steps}")
        if steps < 0:
            raise ValueError(f"steps must be >= 0, got {steps}")
    if seconds is not None and not (is_number(seconds) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds must be a finite number >= 0, got {shown(seconds)}")
    return {"steps": steps, "seconds": None if seconds is None else float(seconds)}
