"""How an input may end: success, or one sentence of the library's own. All else is a finding."""

from __future__ import annotations

import dis
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import gymnasium

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.cli import parsing as flags

HOUSE = os.path.realpath(Path(rl_ebm.__file__).parent)
# Gymnasium's own checks of what is its own (seeds, wrappers, a step before the first reset).
GYMNASIUM = os.path.realpath(Path(gymnasium.__file__).parent) + os.sep
ROOMS = tuple(os.path.realpath(Path(HOUSE) / room) + os.sep for room in ("", "agents", "envs"))
LONGEST = 2000
"""characters of a sentence: whoever wrote 10,000 does not want them back"""
TRACES = re.compile(r"enforce fail at|DefaultCPUAllocator|Traceback \(most recent|Warning: ")
"""what torch, Python and its warnings print, and no sentence holds"""


@dataclass(frozen=True)
class Outcome:
    """What came of an input: ``end`` is success, sentence or finding."""

    end: str
    text: str = ""
    place: str = ""
    """of a finding: where in the library, and what kind of fault, to group them by"""
    trace: str = ""


def call(function: Callable[[], Any]) -> Outcome:
    """Of a call from Python: a ValueError or TypeError that the library itself raises is right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function()
    except Exception as error:
        return of_exception(error)
    return Outcome("success")


def of_exception(error: BaseException) -> Outcome:
    """Whether an exception is one sentence that the library says on purpose."""
    text = str(error)
    said = isinstance(error, (ValueError, TypeError, gymnasium.error.Error)) and _own(error)
    # Unknown or missing arguments: Python says so itself, before anything of ours is run.
    python = isinstance(error, TypeError) and not _library_frames(error.__traceback__)
    if (said or python) and (fault := _no_sentence(text)) is None:
        return Outcome("sentence", text)
    what = f"{type(error).__name__}: {text}"
    if said:
        what = f"{fault}: {what}"
    return Outcome("finding", _cut(what), _place(error), _trace(error))


def command(args: Sequence[str], output: Callable[[], tuple[str, str]]) -> Outcome:
    """Of a command line: exit code 0 (or 1 of ``--max-kl``), or 2 and one line on stderr.

    What the command line passes on must be the library's own words, not those of another.

    Args:
        args: after ``rl-ebm``.
        output: what was printed on stdout and stderr since the last call.
    """
    output()
    try:
        with warnings.catch_warnings(), _told() as told:
            warnings.simplefilter("default")  # each process of a user's shows a warning anew
            code = main(list(args))
        sys.stdout.flush()
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        return Outcome("finding", _cut(what), _place(error), _trace(error))
    _, err = output()
    if code == 0 or (code == 1 and "--max-kl" in " ".join(args)):
        return Outcome("success", _cut(err))
    lines = err.splitlines()
    fault = _no_sentence(err.removesuffix("\n"))
    place = f"rl-ebm {args[0] if args else ''}: "
    if code != 2:
        fault = f"exit code {code}"
    elif len(lines) != 1 or not lines[0].startswith("rl-ebm: "):
        fault = f"{len(lines)} lines on stderr"
    foreign = [x for x in told if isinstance(x, (ValueError, TypeError)) and not _own(x)]
    if fault is None and foreign:
        fault, place = "the words of another library", f"passed on: {_place(foreign[0])}"
        return Outcome("finding", _cut(f"{fault}: {err}"), place, _trace(foreign[0]))
    if fault is None:
        return Outcome("sentence", err)
    return Outcome("finding", _cut(f"{fault}: {err}"), place + fault)


@contextmanager
def _told() -> Iterator[list[BaseException]]:
    """The exceptions that the command line makes its sentences of."""
    told, fail = [], flags.fail

    def listening(message: str) -> int:
        error = sys.exception()
        told.extend([] if error is None else [error])
        return fail(message)

    flags.fail = listening
    try:
        yield told
    finally:
        flags.fail = fail


def _own(error: BaseException) -> bool:
    """Whether a ``raise`` of the library's, or of Gymnasium's in its place, made an exception."""
    return _raised_in(error.__traceback__, (*ROOMS, GYMNASIUM))


def _no_sentence(text: str) -> str | None:
    """What keeps a text from being one sentence."""
    if len(text.split()) < 3:
        return "no sentence"
    if "\n" in text:
        return "more than one line"
    if len(text) > LONGEST:
        return f"more than {LONGEST} characters"
    trace = TRACES.search(text)
    return None if trace is None else f"{trace[0]!r} in it"


def _cut(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:250]} ... {text[-120:]}"


def _in(frame: Any, rooms: tuple[str, ...]) -> bool:
    return os.path.realpath(frame.f_code.co_filename).startswith(rooms)


def _frames(trace: TracebackType | None) -> list[TracebackType]:
    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    return frames


def _library_frames(trace: TracebackType | None) -> list[TracebackType]:
    return [t for t in _frames(trace) if _in(t.tb_frame, ROOMS)]


def _raised_in(trace: TracebackType | None, rooms: tuple[str, ...]) -> bool:
    """The innermost frame is of these files, and stands at a ``raise``: not within a call to C."""
    last = _frames(trace)[-1]
    opcode = last.tb_frame.f_code.co_code[last.tb_lasti]
    at_raise = dis.opname[opcode] in ("RAISE_VARARGS", "RERAISE")
    return at_raise and _in(last.tb_frame, rooms)


def _place(error: BaseException) -> str:
    frames = _library_frames(error.__traceback__)
    if not frames:
        return f"outside the library: {type(error).__name__}"
    last = frames[-1]
    path = os.path.realpath(last.tb_frame.f_code.co_filename)
    file = os.path.relpath(path, os.path.dirname(HOUSE))
    return f"{file}:{last.tb_lineno} {last.tb_frame.f_code.co_name}: {type(error).__name__}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-6000:]
