"""How a command ends: every error is one sentence and an exit code, also those of its output."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from rl_ebm.cli.parsing import fail
from rl_ebm.messages.words import bytes_text
from rl_ebm.packages.plugins import PluginWarning
from rl_ebm.training.stopping import Terminated

# What Python and torch say when a size is too large for the machine.
_SIZES = re.compile("alloc|too large|overflow|out of memory", re.IGNORECASE)
_ENDED = (129, 130, 143)
_STOPPED = "stopped; a run that has begun goes on with rl-ebm train --resume and its folder"


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; its own exit code, or 2 for wrong input, 130, 143 and 129 where Ctrl-C,
    SIGTERM or SIGHUP stopped it, 141 where nobody reads its output any more.
    """
    code = 0
    try:
        with _warned():
            code = _told(command)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        return code
    except BrokenPipeError:  # whoever reads our output has seen enough
        _be_silent()
        return 141
    except OSError as error:
        _be_silent()
        told = f"{error.strerror or error}: standard output"
        return code if code in _ENDED else _last_words(told, 2)


def out_of_memory(text: str) -> str:
    """A sentence in the place of what an allocator says."""
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    array = re.search(r"Unable to allocate ([\d.]+) ?(\w+) for an array", text)  # numpy
    once = f": {bytes_text(int(asked[1]))} at once" if asked else ""
    once = f": {array[1].rstrip('.')} {array[2]} at once" if array else once
    return f"not enough memory for these sizes{once}; make them smaller"


def _told(command: Callable[[], int]) -> int:
    try:
        return command()
    except Terminated as stop:
        return _last_words(stop.told or _STOPPED, int(stop.code or 0))
    except SystemExit as stop:  # help was printed
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        return _last_words(str(stop) or _STOPPED, 130)
    except OSError as error:
        if error.filename is None:
            raise  # of standard output
        return fail(f"{error.strerror or error}: {error.filename}")
    except MemoryError as error:
        own = not str(error) or "for an array" in str(error)
        return fail(out_of_memory(str(error)) if own else str(error))
    except torch.OutOfMemoryError as error:
        return fail(out_of_memory(str(error)))
    except (ValueError, TypeError) as error:
        return fail(str(error))
    except (RuntimeError, OverflowError) as error:
        if not _SIZES.search(str(error)):
            raise
        return fail(out_of_memory(str(error)))


def _last_words(text: str, code: int) -> int:
    """The code, said or not: the terminal may be gone, and nobody there to read."""
    with suppress(OSError):
        fail(text)
    return code


@contextmanager
def _warned() -> Iterator[None]:
    """Let a warning of an installed package that cannot be used be one sentence, as errors are."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, PluginWarning):
                fail(str(message))
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _be_silent() -> None:
    """Let what is still to be printed vanish: nobody can read it."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, AttributeError):  # closed, or none
            try:
                stream.flush()
            except OSError:
                os.dup2(null, stream.fileno())
    os.close(null)
