"""What another process puts in a file's place after it was looked at, and before it is opened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rl_ebm.files import RunError, lock
from rl_ebm.files import opening as files

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="links, FIFOs and locks of POSIX")


def appears(monkeypatch, module, change):
    """Have something done once, right after a path was found to be a regular file."""
    real, left = module.check_regular, [change]

    def look(path: Path, alone: bool = False) -> None:
        real(path, alone)
        if left:
            left.pop()()

    monkeypatch.setattr(module, "check_regular", look)


@pytest.fixture
def no_hang():
    """A test that would wait for ever fails instead."""

    def tell(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, tell)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_fifo_is_not_waited_for(tmp_path, monkeypatch, no_hang):
    path = tmp_path / "f"
    path.write_text("x")
    appears(monkeypatch, files, lambda: (path.unlink(), os.mkfifo(path)))
    with pytest.raises(RunError, match="is a FIFO"):
        files.open_existing(path)


def test_another_name_of_a_file_is_seen(tmp_path, monkeypatch):
    path, other = tmp_path / "f", tmp_path / "other"
    path.write_text("x")
    appears(monkeypatch, files, lambda: os.link(path, other))
    with pytest.raises(RunError, match="hard link"):
        files.open_existing(path, "ab", alone=True)


def test_a_lock_makes_nothing_at_the_end_of_a_link(tmp_path, monkeypatch):
    path, outside = tmp_path / "run.lock", tmp_path / "outside"
    appears(monkeypatch, lock, lambda: path.symlink_to(outside))
    with pytest.raises((RunError, OSError)), lock.only_one(tmp_path):
        raise AssertionError("it must not be held")
    assert not outside.exists()


def test_a_lock_that_its_last_holder_deletes_is_made_again(tmp_path, monkeypatch):
    path, real, left = tmp_path / "run.lock", lock.fcntl.flock, [1]

    def flock(held: int, how: int) -> None:
        real(held, how)
        if left:
            left.pop()
            path.unlink()  # the last thing that the other did

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.only_one(tmp_path):
        assert int(path.read_text()) == os.getpid()
        with pytest.raises(RunError, match="is in use"), lock.only_one(tmp_path):
            raise AssertionError("two hold it")
    assert not path.exists()


def test_the_lock_of_another_is_left_alone(tmp_path):
    path = tmp_path / "run.lock"
    with lock.only_one(tmp_path):
        path.unlink()
        path.write_text("1\n")
    assert path.read_text() == "1\n"


def test_a_lock_with_another_name_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    os.link(outside, tmp_path / "run.lock")
    with pytest.raises(RunError, match="hard link"), lock.only_one(tmp_path):
        raise AssertionError("it must not be held")
    assert outside.read_text() == "mine"
