"""One process at a time writes into a folder: a lock that dies with its process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_ebm.files import LOCK, RunError, check_regular, gone

try:
    import fcntl
except ImportError:  # Windows: without a lock
    fcntl = None  # type: ignore[assignment]

# Where a file system knows no locks, or nothing can be written: then no other process can either.
_NOT_ALLOWED = (errno.EACCES, errno.EROFS, errno.EPERM)
_NONE = (errno.ENOLCK, errno.ENOTSUP, *_NOT_ALLOWED)
_FLAGS = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC if fcntl is not None else 0


@contextmanager
def only_one(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, which must be there.

    Yields:
        what raises a RunError where another folder has come into its place since: nothing of this
        process is written into that.

    Raises:
        RunError: another process holds it; its number is told.
    """
    own = os.stat(folder)
    held = None if fcntl is None else _take(folder / LOCK)

    def check() -> None:
        try:
            same = os.path.samestat(os.stat(folder), own)
        except OSError:
            same = False
        if not same or (held is not None and not _is(folder / LOCK, held)):
            raise gone(folder)

    try:
        yield check
    finally:
        if held is not None:
            _release(folder / LOCK, held)


def _open(path: Path) -> int | None:
    """The lock, made if it is not there; None where it cannot be opened.

    One that another user has made may be read, and that is enough to be told that it is held.
    """
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            return os.open(path, flags | _FLAGS, 0o666)
        except FileNotFoundError:
            if flags != os.O_RDONLY:
                raise  # the folder is gone
        except OSError as error:
            if error.errno not in _NONE:
                raise
    return None


def _take(path: Path) -> int | None:
    while True:
        check_regular(path, alone=True)
        held = _open(path)
        if held is None:
            return None
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
            _sign(held)
            return held
        os.close(held)  # whoever had it has deleted it since it was opened


def _sign(held: int) -> None:
    """Say who holds it, where there is room for that: on a full disk it is held all the same."""
    try:
        os.ftruncate(held, 0)
        os.pwrite(held, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        return


def _release(path: Path, held: int) -> None:
    try:
        if _is(path, held):
            path.unlink()
    except PermissionError:  # of another user's folder: who holds it is told by the lock alone
        return
    finally:
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
