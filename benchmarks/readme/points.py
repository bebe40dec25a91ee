"""Which settings of an agent are tried: a grid, then whatever stands beside the best until it does.

An optimum at the edge of a grid is none. So each setting lies on a ladder, and a point is bracketed
when both of its neighbours on every ladder were tried as well, and are worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from rl_ebm.agents import entry_of, make_options

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
EXPLORED = (0.0, 0.25, 0.5, 0.75)
REPLAYED = (0, 1)
GRID = {"lr": RATES[2:6], "batch_size": (32, 256, 1024)}
"""what everybody begins with: twelve points"""
KEPT = 8192
"""responses that are kept, where some are replayed"""


@dataclass(frozen=True)
class Point:
    """Settings of an agent; None of what it does not have."""

    lr: float
    batch_size: int
    explore: float | None = None
    replay: int | None = None
    """replayed responses for each new one"""

    def options(self) -> dict[str, Any]:
        """As the agent takes them."""
        found: dict[str, Any] = {"lr": self.lr, "batch_size": self.batch_size}
        if self.explore is not None:
            found["explore"] = self.explore
        if self.replay:
            found |= {"replay_size": KEPT, "replay_batch": self.replay * self.batch_size}
        return found

    def told(self) -> dict[str, float]:
        """What it says, by the names of its settings."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def ladders(agent: str) -> dict[str, tuple[float, ...]]:
    """The settings of an agent, and the values of each."""
    config = entry_of(agent).config
    names = {field.name for field in fields(config)}
    found: dict[str, tuple[float, ...]] = {"lr": RATES, "batch_size": BATCHES}
    if "explore" in names and _takes(agent, {"explore": 0.0}):
        found["explore"] = tuple(sorted({*EXPLORED, config().explore}))
    if "replay_batch" in names:
        found["replay"] = REPLAYED
    return found


def grid(agent: str) -> list[Point]:
    """The first points of an agent: its own exploration, and nothing replayed."""
    has = ladders(agent)
    explore = entry_of(agent).config().explore if "explore" in has else None
    points = [
        Point(lr, int(batch), explore, 0 if "replay" in has else None)
        for lr, batch in product(*GRID.values())
    ]
    return [point for point in points if _takes(agent, point.options())]


def beside(agent: str, point: Point) -> list[Point]:
    """The neighbours of a point: one setting one step down or up its ladder."""
    found = []
    for name, ladder in ladders(agent).items():
        at = ladder.index(point.told()[name])
        found += [replace(point, **{name: x}) for x in ladder[max(0, at - 1) : at]]
        found += [replace(point, **{name: x}) for x in ladder[at + 1 : at + 2]]
    return [near for near in found if _takes(agent, near.options())]


def next_point(agent: str, scores: Mapping[Point, float]) -> Point | None:
    """The next point to try; None where the best is bracketed.

    Args:
        scores: of those that were tried: the smallest is best, infinite where a run failed.
    """
    for point in grid(agent):
        if point not in scores:
            return point
    best = min(scores, key=lambda point: scores[point])
    if scores[best] == math.inf:
        return None
    return next((near for near in beside(agent, best) if near not in scores), None)


def _takes(agent: str, options: Mapping[str, Any]) -> bool:
    try:
        make_options(agent, entry_of(agent), dict(options))
    except ValueError:
        return False
    return True
