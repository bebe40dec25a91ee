"""How often something is done that costs time: never more than a tenth of it."""

from __future__ import annotations

SHARE = 0.1
FREE = 0.5
"""seconds that something small may take without being put off: a tenth of the usual interval"""


class Pace:
    """Says when the next time is due.

    Args:
        every: seconds between two times, at least.
        now: when it was done last.
        costs: seconds that it took, and that it is expected to take next.
        small: whether it is next to nothing, which another program may hold up all the same: it
            is then done as often as asked for, where it does not take really long.
    """

    def __init__(
        self,
        every: float | int,
        now: float,
        costs: tuple[float, float] = (0.0, 0.0),
        small: bool = False,
    ) -> None:
        self.every, self.started, self.last = every, now, now
        self.spent = 0.0
        self.costs, self.small = costs, small

    def due(self, now: float) -> bool:
        """Whether to do it now."""
        if now - self.last < self.every:
            return False
        if self.small and min(self.costs) < FREE:
            return True
        return self.spent + self.costs[-1] <= SHARE * (now - self.started)

    def did(self, began: float, ended: float) -> None:
        """It was done between two times."""
        self.last = ended
        self.spent += ended - began
        self.costs = (self.costs[-1], ended - began)
