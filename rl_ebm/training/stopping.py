"""Ctrl-C, SIGTERM and SIGHUP between two steps: what was trained is saved first."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# Windows knows no terminal that hangs up.
ENDS = (signal.SIGTERM,) if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)
SIGNALS = (signal.SIGINT, *ENDS)
AGAIN = 5.0
"""seconds in which the ends that a shell, a terminal or a scheduler send are one and the same"""
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP has asked the process to end; 143 or 129 is its exit code.

    Args:
        number: of the signal.
        told: what was saved, and how it goes on.
    """

    def __init__(self, number: int = signal.SIGTERM, told: str = "") -> None:
        super().__init__(128 + number)
        self.told = told


class Interrupted(BaseException):
    """A signal came while nothing was changed."""


class Asked:
    """Whether a signal has asked to stop, and which."""

    signal: int | None = None
    told = ""
    """what was saved, and how it goes on"""
    at_once = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Nothing that is to be saved changes inside: a signal raises :class:`Interrupted`."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def kept(self, run: Path, step: int, complete: bool) -> None:
        """Say what was saved, and how it goes on."""
        resume = f"rl-ebm train --resume {shlex.quote(str(run))}"
        self.told = f"stopped at step {step}, which is kept: {resume} goes on"
        if complete:
            self.told = f"asked to stop as the run was finished: step {step}, the last, is kept"

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stops_between_steps() -> Iterator[Asked]:
    """Only note the first of the signals; it is raised at the end. A second Ctrl-C acts at once.

    So does a SIGTERM some time after it. A terminal that is closed may hang up twice, and a shell
    or a scheduler ends a parent and its children, which the parent then ends: that is one wish.
    Signals that somebody else handles, or that another thread would get, are left alone.

    Raises:
        KeyboardInterrupt, Terminated: at the end, where one was noted.
    """
    asked, since = Asked(), 0.0
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not asked:
            asked.signal, since = number, time.monotonic()
            if asked.at_once:
                raise Interrupted
            return
        if number in ENDS and (number != signal.SIGTERM or time.monotonic() - since < AGAIN):
            return
        restore()
        os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            # Ignored signals stay ignored: those of a shell's background jobs.
            if handler in _DEFAULT and not (number == signal.SIGINT and handler == signal.SIG_DFL):
                before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
    if asked.signal == signal.SIGINT:
        raise KeyboardInterrupt(asked.told)
    if asked.signal is not None:
        raise Terminated(asked.signal, asked.told)


@contextmanager
def ending_raises() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`Terminated`, as Ctrl-C raises KeyboardInterrupt.

    Once: what ends then is not disturbed.
    """
    main = threading.current_thread() is threading.main_thread()
    ours = [n for n in ENDS if main and signal.getsignal(n) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
