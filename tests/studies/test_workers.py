"""Processes that do jobs: one that is killed, a parent that is, and who is told what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import worker_cases
from run_cases import HANGS
from worker_cases import square_or_die

from rl_ebm.studies import workers
from rl_ebm.studies.workers import Lost, Workers
from rl_ebm.training.stopping import Terminated


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_is_killed_takes_no_other_job_along(count):
    jobs = [1, 13, 2, -1, 3, 13, 4]
    found = {}
    with Workers(square_or_die, count) as processes:
        for i, result in processes.each(jobs):
            try:
                found[i] = result()
            except (Lost, ValueError) as error:
                found[i] = str(error)
    assert [found[i] for i in (0, 2, 4, 6)] == [1, 4, 9, 16]
    assert found[3] == "-1 is negative"
    assert all("was killed" in found[i] for i in (1, 5))


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_parent(number, tmp_path):
    """Also with one that is killed, and that can tell nobody."""
    command = [sys.executable, worker_cases.__file__, str(tmp_path)]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + HANGS
    while len(found := list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    pids = [int(path.suffix[1:]) for path in found]
    assert all(map(alive, pids))
    parent.send_signal(number)
    parent.wait(HANGS)
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_was_saved_ends_a_process_without_a_word(monkeypatch):
    def work(job):
        raise Terminated(signal.SIGTERM)

    ended = []
    monkeypatch.setattr(workers.os, "_exit", ended.append)
    workers._done(work, 0)
    assert ended == [128 + signal.SIGTERM]


def test_a_terminal_that_hangs_up_is_the_parents_affair(monkeypatch):
    handlers, watched = {}, []
    monkeypatch.setattr(workers.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(workers.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(threading.Thread, "start", lambda self: watched.append(self.daemon))
    workers._begin()
    assert handlers == {signal.SIGINT: signal.SIG_DFL, signal.SIGHUP: signal.SIG_IGN}
    assert watched == [True]
