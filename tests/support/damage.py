"""A command in a process of its own, which cannot harm the test."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

from rl_ebm.cli import main


class Result:
    """How a command ended that ran in a process of its own."""

    def __init__(self, status: int, err: str) -> None:
        self.killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self.code = None if self.killed else os.waitstatus_to_exitcode(status)
        self.err = err

    def fault(self) -> str | None:
        """What is wrong with an end that is neither success nor one sentence."""
        if self.killed:
            return f"killed by {signal.Signals(self.killed).name}"
        if self.code == 0:
            return None
        lines = self.err.count("\n")
        good = self.code == 2 and self.err.startswith("rl-ebm: ") and lines == 1
        return None if good else f"exit code {self.code}: {self.err[-1500:]}"


def run_limited(args: list[str], log: Path, seconds: int = 10, memory: int = 4 * 2**30) -> Result:
    """A command in a forked child, with limits of time and memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking where threads are
        pid = os.fork()
    if pid == 0:
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # Not pytest's: these are the child's own.
            sys.stdout, sys.stderr = (
                os.fdopen(n, "w", errors="backslashreplace", closefd=False) for n in (1, 2)
            )
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            # Of the processor: others may use it. What waits for ever uses none.
            spent = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(spent.ru_utime + spent.ru_stime) + seconds + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(6 * seconds)
            code = main(args)
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return Result(status, log.read_text(errors="replace"))
