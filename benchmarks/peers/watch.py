"""The stopwatch: it runs while a method trains, and stands still while its policy is verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from rl_ebm import verify
from rl_ebm.exact import Solution, lists
from rl_ebm.policies import Policy
from rl_ebm.studies.bench_rows import SAMPLES
from rl_ebm.verification.sampled_report import AnyReport, SampledReport

DRAWN = 1000
"""responses of target and policy each of a look, where they are too many to be listed"""
FIGURES = ("kl_policy_target", "kl_target_policy", "tv")
Rows = list[dict[str, Any]]


class TimeUp(Exception):
    """The time of a run is over."""


def grid(limit: float, looks: int) -> list[float]:
    """Seconds at which to look: half of them in equal steps, half in equal ratios.

    Args:
        limit: the last of them; a third of it is there too.
        looks: about how many.
    """
    half = looks // 2
    steps = [limit * (i + 1) / half for i in range(half)]
    ratios = [limit * 200 ** (i / half - 1) for i in range(half)]
    return sorted({*steps, *ratios, limit / 3, limit})


def figures_of(report: AnyReport) -> dict[str, float]:
    """What a row keeps of a report, to six digits: with the ends of intervals where it has any."""
    found = {name: report.scalars()[name] for name in FIGURES}
    if isinstance(report, SampledReport):
        ends = report.ends()
        found |= {f"{k}_{end}": ends[f"{k}/{end}"] for k in FIGURES for end in ("low", "high")}
    rounded = {name: float(f"{value:.6g}") for name, value in found.items()}
    return rounded | ({SAMPLES: report.num_samples} if isinstance(report, SampledReport) else {})


class Watch:
    """Measures one run.

    What a method does before ``start`` (imports, building networks) is not counted. What comes
    after is, compilation too: the first row says when the first update was done.

    Args:
        solution: what policies are compared with.
        limit: seconds of training.
        looks: about how many times the policy is verified.
        clock: what tells the time.
        samples: responses of target and policy each of a look, where they are not all listed.
    """

    def __init__(
        self,
        solution: Solution,
        limit: float,
        looks: int = 50,
        clock: Callable[[], float] = time.perf_counter,
        samples: int = DRAWN,
    ) -> None:
        self.solution, self.limit, self.clock = solution, limit, clock
        self.samples = None if lists(solution) else samples
        self.parameters = 0
        self.rows: Rows = []
        self._due = grid(limit, looks)
        self._trained = 0.0
        self._since: float | None = None

    def start(self, parameters: int) -> None:
        """Training begins now, of so many weights."""
        self.parameters = parameters
        self._since = self.clock()

    @property
    def seconds(self) -> float:
        """Trained seconds."""
        running = 0.0 if self._since is None else self.clock() - self._since
        return self._trained + running

    @property
    def progress(self) -> float:
        """Share of the time that is over: what learning-rate schedules depend on."""
        return min(1.0, self.seconds / self.limit)

    def __call__(self, policy: Policy, updates: int, reward_calls: int) -> None:
        """Between updates: look at the policy where a look is due.

        Args:
            updates: gradient steps so far.
            reward_calls: complete responses scored so far.

        Raises:
            TimeUp: the run is over.
        """
        seconds = self.seconds
        if self.rows and seconds < self._due[0]:
            return
        self._trained, self._since = seconds, None
        # Methods draw from global generators: looking must not move them.
        with torch.random.fork_rng(devices=[]):
            generator = torch.Generator().manual_seed(updates)
            report = verify(policy, self.solution, samples=self.samples, generator=generator)
        self.rows.append(
            {
                "seconds": round(seconds, 3),
                "updates": updates,
                "reward_calls": reward_calls,
                **figures_of(report),
            }
        )
        self._due = [due for due in self._due if due > seconds]
        if not self._due:
            raise TimeUp
        self._since = self.clock()
