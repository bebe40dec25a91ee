"""Ctrl-C and SIGTERM between two steps: what was trained is saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Terminated(SystemExit):
    """SIGTERM has asked the process to end; 143 is its exit code."""

    def __init__(self, code: int = 128 + signal.SIGTERM) -> None:
        super().__init__(code)


class Interrupted(BaseException):
    """A signal came while nothing was changed."""


class Asked:
    """Whether a signal has asked to stop, and which."""

    signal: int | None = None
    at_once = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Nothing that is to be saved changes inside: a signal raises :class:`Interrupted`."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stops_between_steps() -> Iterator[Asked]:
    """Only note the first Ctrl-C or SIGTERM; it is raised at the end. A second one acts at once.

    Signals that somebody else handles, or that another thread would get, are left alone.

    Raises:
        KeyboardInterrupt, Terminated: at the end, where one was noted.
    """
    asked = Asked()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.signal = number
            if asked.at_once:
                raise Interrupted
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
        raise KeyboardInterrupt
    if asked.signal == signal.SIGTERM:
        raise Terminated


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`, as Ctrl-C raises KeyboardInterrupt."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
