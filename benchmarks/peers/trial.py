"""On how many threads a contender runs: those of one or all that make more updates in a trial.

Where steps are small, threads that wait for each other cost more than they help: what is best
depends on the library, the task and the machine, and nobody should lose for having the other.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.peers.crossings import speed
from benchmarks.peers.entries import CONTENDERS
from benchmarks.peers.processes import Run, start

SECONDS = 5.0
"""of each trial"""


def fastest(run: Run, interpreter: str) -> int | str:
    """The number of threads, one or the run's own, with more updates; or why it does not start.

    Nothing is tried where there is one core, nor with a library that spreads its work over all
    cores by itself.
    """
    if run.threads == 1 or CONTENDERS[run.contender].spreads:
        return run.threads
    speeds: dict[int, float] = {}
    for threads in (1, run.threads):
        trial = replace(run, threads=threads, seconds=min(SECONDS, run.seconds), looks=2)
        found = start(trial, interpreter)
        if isinstance(found, str):
            return found
        speeds[threads] = speed(found["rows"])
    return max(speeds, key=lambda threads: speeds[threads])
