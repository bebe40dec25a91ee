"""What control groups leave of memory: those of a container, a batch job, a service.

Limits hold for a group and all above it, so that each from this process's own up to the root that
is seen here is asked. In a container the path that the kernel tells may be one of the machine,
which is not seen from inside: what is not there is passed over, and the root is the container's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
TOLD = Path("/proc/self/cgroup")
UNLIMITED = 2**63
"""and version 1 tells no limit as a little less"""
NEAR_UNLIMITED = 2**62


def left_by_groups(root: Path = ROOT, told: Path = TOLD) -> int:
    """Bytes that may still be taken; :data:`UNLIMITED` where there is no limit.

    Args:
        root: where control groups are mounted.
        told: which groups this process is in, a line ``id:controllers:path`` each; version 2 has
            the one without controllers.
    """
    found = UNLIMITED
    for folder, names in _groups(root, told):
        limit, used = (_number(folder / name) for name in names[:2])
        if limit is not None and limit < NEAR_UNLIMITED:
            found = min(found, limit - (used or 0) + _cache(folder / "memory.stat", names[2]))
    return max(0, found)


def _groups(root: Path, told: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Each group's folder, with the names of its limit, of what is used, and of its cache."""
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    version_2 = ("memory.max", "memory.current", "inactive_file")
    try:
        text = told.read_text(encoding="utf-8", errors="surrogateescape")  # names of any bytes
        lines = [line.split(":", 2) for line in text.splitlines()]
    except OSError:  # not Linux
        lines = []
    own = {line[1]: line[2] for line in lines if len(line) == 3}
    memory = next((path for kinds, path in own.items() if "memory" in kinds.split(",")), "/")
    for top, path, names in (
        (root / "memory", memory, version_1),
        (root, own.get("", "/"), version_2),
    ):
        for folder in (top, *_below(top, path)):
            yield folder, names


def _below(top: Path, path: str) -> Iterator[Path]:
    """The groups on the way to one; none where it lies outside of what is seen."""
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts:
        return
    for i in range(len(parts)):
        yield top.joinpath(*parts[: i + 1])


def _number(path: Path) -> int | None:
    """What a file of one number says; None where there is none, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cache(stat: Path, name: str) -> int:
    """Bytes of files that nobody reads just now: they count as used, and are given up first."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
