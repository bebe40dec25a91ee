"""The files of a run: opened in one way, which follows nothing out of its folder.

A run's folder may come from anybody. Where a regular file is expected, a symbolic link, a FIFO, a
socket, a device or a folder is refused, in one sentence and before it is read, written or waited
for. Files are replaced as a whole, so that a hard link to one keeps what it had; what is changed
in place must have no other name.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from rl_ebm.messages.memory import check_fits
from rl_ebm.messages.words import bytes_text

CONFIG = "config.json"
POLICY = "policy.safetensors"
STATE = "state.pt"
SCORES = "task.safetensors"
REPORT = "report.json"
CERTIFICATE = "certificate.json"
METRICS = "metrics.csv"
EVENTS = "events.out.tfevents.*"
LOCK = "run.lock"
FILES = (CONFIG, POLICY, STATE, SCORES, REPORT, CERTIFICATE, METRICS)

# Which run it is, and which of its processes; of older runs the last alone.
_OWN_EVENTS = re.compile(r"events\.out\.tfevents\.\d{10}\..*\.\d+\.([0-9a-f]{8})(?:[0-9a-f]{8})?")
_PART = re.compile(r"(.+?)(\.[0-9a-f]{8})?\.part")
# What Windows lacks is 0 there.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
MAX_JSON = 2**28
"""bytes of the largest text that is read: a report of ten thousand prompts has a sixth of it"""

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class RunError(ValueError):
    """A run directory that cannot be used, or a run that had to stop; says what to do."""


def check_regular(path: Path, alone: bool = False) -> None:
    """Check that there is a regular file or nothing at a path.

    Args:
        alone: whether it must have no other name either: it is to be changed in place.

    Raises:
        RunError: something else is there.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:  # of a path with a NUL
        raise RunError(f"{str(path)!r} is no path") from None
    _check(path, found, alone)


def own_files(run: Path) -> list[Path]:
    """What there is of a run's files in a folder, all of them checked; parts of them too.

    Raises:
        RunError: one is no regular file.
    """
    found = [run / name for name in FILES if os.path.lexists(run / name)] + own_events(run)
    for path in (*found, *parts(run), run / LOCK):
        check_regular(path)
    return found


def own_events(run: Path) -> list[Path]:
    """Event files that a run has written: those of other writers have names without its ending."""
    return [path for path in sorted(run.glob(EVENTS)) if _OWN_EVENTS.fullmatch(path.name)]


def marks(names: Iterable[str]) -> set[str]:
    """What the names of a run's event files have in common, and no other run's have."""
    return {found[1] for name in names if (found := _OWN_EVENTS.fullmatch(name))}


def parts(folder: Path, names: Iterable[str] = (*FILES, EVENTS)) -> list[Path]:
    """What writes of these files that were cut short have left in their folder."""
    found = [(path, _PART.fullmatch(path.name)) for path in sorted(folder.glob("*.part"))]
    names = tuple(names)
    return [path for path, part in found if part and any(fnmatch(part[1], n) for n in names)]


def check_folder(path: Path) -> None:
    """Check that a folder inside a run's or a benchmark's is a folder, or not there yet.

    Raises:
        RunError: a link, or something else, is in its place.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise RunError(
            f"{path} is {_kind(mode)}, where a folder is expected: nothing outside the folder "
            "above is read or written"
        )


def open_existing(path: Path, mode: str = "rb", alone: bool = False) -> BinaryIO:
    """Open a regular file that is there, and nothing else.

    Args:
        mode: ``rb``, ``ab`` or ``r+b``.
        alone: as in :func:`check_regular`.

    Raises:
        RunError: no regular file.
        FileNotFoundError: nothing is there.
    """
    check_regular(path, alone)  # before it is opened: opening some devices does something
    try:
        file: Any = open(path, mode, opener=_existing)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link or a FIFO since then
            check_regular(path)
        raise
    try:
        _check(path, os.fstat(file.fileno()), alone)
    except BaseException:
        file.close()
        raise
    opened: BinaryIO = file
    return opened


def read_text(path: Path, most: int = MAX_JSON) -> str:
    """The text of a regular file.

    Raises:
        RunError: no regular file, or one of more than ``most`` bytes.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with open_existing(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise RunError(
                f"{path} has {bytes_text(size)}, more than the {bytes_text(most)} that such a "
                "file can have: it is damaged"
            )
        return file.read(most).decode()


def check_size(path: Path, size: int) -> None:
    """Check that the contents of a file fit into memory.

    Raises:
        RunError: they do not.
    """
    try:
        check_fits(size, str(path), "read it on a larger machine")
    except ValueError as error:
        raise RunError(str(error)) from None


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside ``path`` and move it there: readers see the old one or the new one.

    Of two processes that write the same file at a time both are whole, and one of them stays.

    Raises:
        RunError: no regular file is at ``path``, or its folder is gone.
        OSError: of the file system (a full disk, say); ``path`` is then as it was.
    """
    check_regular(path)
    part, made = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part"), False
    try:
        with open(part, "xb", opener=_fresh) as file:
            made = True
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if made:
            _remove(part)
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise gone(path.parent) from None
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        _remove(part)
        raise


def another_policy(path: Path, names: Iterable[str] = ()) -> str:
    """The sentence about weights that do not fit.

    Args:
        names: of weights that one of the two policies alone has.
    """
    return f"{path} holds the weights of another policy than {CONFIG} says{only_one(names)}"


def only_one(names: Iterable[str]) -> str:
    """What only one of two policies has, for a sentence; and what to do where that is its V."""
    first, *others = [*sorted(names), ""]
    if not first:
        return ""
    told = f" (only one of them has {first}{' and more' if others[1:] else ''}"
    if first.startswith("value_head."):
        told += ": make the one that you pass with value_head=True, or False"
    return told + ")"


def gone(run: Path) -> RunError:
    """The sentence about a folder that was deleted while its run went on."""
    return RunError(
        f"the folder {run} is gone: it was deleted or moved while the run wrote to it; what was "
        "not saved elsewhere is lost"
    )


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def create(path: Path) -> BinaryIO:
    """A new file, open for writing; what has its name already is no longer there.

    Raises:
        RunError: what has its name is no regular file.
    """
    check_regular(path)
    try:
        return open(path, "xb", opener=_fresh)
    except FileExistsError:
        path.unlink()
        return open(path, "xb", opener=_fresh)


def cut(path: Path, size: int) -> None:
    """Cut a file to at most so many bytes; a hard link to it keeps them all.

    Raises:
        RunError: no regular file.
    """
    with open_existing(path, "r+b") as file:
        found = os.fstat(file.fileno())
        if found.st_size <= size:
            return
        if found.st_nlink == 1:
            file.truncate(size)
            return
        write_atomically(path, lambda new: _copy(file, new, size))


def _copy(old: BinaryIO, new: BinaryIO, size: int) -> None:
    while size and (chunk := old.read(min(size, 2**20))):
        new.write(chunk)
        size -= len(chunk)


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:
        return  # of the same trouble, which the caller is about to tell


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT | _NO_LINK | _NO_WAIT)


def _fresh(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | _NO_LINK, 0o666)


def _check(path: Path, found: os.stat_result, alone: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise RunError(
            f"{path} is {_kind(found.st_mode)}, where a file is expected: a run's files are "
            "regular files, and nothing outside its folder is read or written"
        )
    if alone and found.st_nlink > 1:
        raise RunError(
            f"{path} has another name outside of the run (a hard link), which would change with "
            "it: replace it by a copy"
        )


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "no regular file")
