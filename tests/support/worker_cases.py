"""What processes are given to do in tests: they import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from rl_ebm.studies.workers import Workers


def square_or_die(x: int) -> int:
    """The square; with 13 the process is killed, and a negative number is refused."""
    if x == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x * x


def wait_long(told: str) -> None:
    """Say who does it, and do it for a minute."""
    Path(told).with_suffix(f".{os.getpid()}").touch()
    time.sleep(60)


def main() -> None:
    """One process works, and one has nothing to do."""
    with Workers(wait_long, 2) as workers:
        for _, result in workers.each([f"{sys.argv[1]}/{i}" for i in range(2)]):
            result()


if __name__ == "__main__":
    main()
