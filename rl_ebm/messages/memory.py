"""How much memory this machine has left, asked before anything large is made."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from rl_ebm.messages.control_groups import left_by_groups
from rl_ebm.messages.words import bytes_text


def free_bytes() -> int:
    """Bytes of main memory that can still be taken: of the machine, control group, or process."""
    return min(_machine(), left_by_groups(), _process())


def check_fits(need: int, what: str, advice: str) -> None:
    """Check that something fits into the memory that is free.

    Args:
        need: bytes that it takes, at least.
        what: the subject of the sentence, ``a network of these sizes`` say.
        advice: what to do where it does not fit.

    Raises:
        ValueError: it does not; nothing has been taken.
    """
    free = free_bytes()
    if need > free:
        raise ValueError(
            f"not enough memory: {what} needs {bytes_text(need)} and {bytes_text(free)} are free; "
            f"{advice}"
        )


def _machine() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux: count all of the memory
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def _process() -> int:
    """What the limit of address space leaves (``ulimit -v``); a large number without one."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return 2**63
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        return most
    return max(0, most - pages * resource.getpagesize())
