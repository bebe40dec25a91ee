"""One process at a time writes into a folder: a lock that dies with its process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_ebm.files import LOCK, RunError, check_regular

try:
    import fcntl
except ImportError:  # Windows: without a lock
    fcntl = None  # type: ignore[assignment]

# Where a file system knows no locks, or nothing can be written: then no other process can either.
_NONE = (errno.ENOLCK, errno.ENOTSUP, errno.EACCES, errno.EROFS, errno.EPERM)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which must be there.

    Raises:
        RunError: another process holds it; its number is told.
    """
    held = None if fcntl is None else _take(folder / LOCK)
    try:
        yield
    finally:
        if held is not None:
            _release(folder / LOCK, held)


def _take(path: Path) -> int | None:
    while True:
        check_regular(path, alone=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            held = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno in _NONE:
                return None
            raise
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(path.parent, held) from None
        except OSError as error:
            os.close(held)
            if error.errno in _NONE:
                return None
            raise
        if _is(path, held):
            os.ftruncate(held, 0)
            os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
            return held
        os.close(held)  # whoever had it has deleted it since it was opened


def _release(path: Path, held: int) -> None:
    if _is(path, held):
        path.unlink()
    os.close(held)


def _is(path: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(held))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _busy(folder: Path, held: int) -> RunError:
    try:
        pid = os.pread(held, 20, 0).decode("ascii", "replace").strip()
    finally:
        os.close(held)
    who = f"process {pid}" if pid.isdecimal() else "another process"
    return RunError(
        f"{folder} is in use: {who} is training into it; wait for it, stop it, or choose another "
        "folder"
    )
