"""Jobs done by processes of their own, some at a time: one that is killed takes no other along."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Generic, NoReturn, TypeVar

import torch

from rl_ebm.training.stopping import ENDS, Terminated

J = TypeVar("J")
R = TypeVar("R")


class Lost(RuntimeError):
    """The process of a job has been killed."""


class Workers(Generic[J, R]):
    """Processes with one thread each, every one a pool of its own.

    In one pool for all a process that is killed, as the first is where memory runs out, would break
    the others' jobs as well.

    Args:
        work: what is done with a job; a function of a module.
        count: jobs at a time.
    """

    def __init__(self, work: Callable[[J], R], count: int) -> None:
        self.work, self.count = work, count
        self.idle: list[ProcessPoolExecutor] = []
        self.running: dict[Future[R], tuple[int, ProcessPoolExecutor]] = {}

    def __enter__(self) -> Workers[J, R]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what runs; where this process is asked to stop, have it stop as well."""
        processes = [*self.idle, *(process for _, process in self.running.values())]
        if kind is not None and not issubclass(kind, Exception):
            for pool in processes:
                for process in list((pool._processes or {}).values()):
                    process.terminate()
        for pool in processes:
            pool.shutdown(cancel_futures=True)

    def each(self, jobs: Sequence[J]) -> Iterator[tuple[int, Callable[[], R]]]:
        """Jobs as they end: which, and a function that gives what it gave, or raises its error.

        One whose process was killed raises :class:`Lost`.
        """
        waiting = deque(range(len(jobs)))
        while waiting or self.running:
            while waiting and len(self.running) < self.count:
                i = waiting.popleft()
                pool = self.idle.pop() if self.idle else self._new()
                self.running[pool.submit(_done, self.work, jobs[i])] = i, pool
            for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                i, pool = self.running.pop(future)
                result: Callable[[], R] = future.result
                if isinstance(future.exception(), BrokenProcessPool):
                    result = _lost
                    pool.shutdown()
                else:
                    self.idle.append(pool)
                yield i, result

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), _begin)


def _lost() -> NoReturn:
    raise Lost("its process was killed, as by a machine that is short of memory")


def _done(work: Callable[[J], R], job: J) -> R:
    """What a process does. Asked to end, it has saved what it did, and nobody waits for more."""
    try:
        return work(job)
    except Terminated as end:
        os._exit(int(end.code or 1))


def _begin() -> None:
    """One thread for each process, which Ctrl-C ends without a word of its own.

    Where a terminal is closed the parent is told as well, and ends its processes. Where the parent
    is killed nobody tells: they look themselves.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in set(ENDS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
