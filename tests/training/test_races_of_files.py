"""What another process puts in a file's place after it was looked at, and before it is opened."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import rl_ebm
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


def test_a_lock_holds_on_a_full_disk_and_is_given_back(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with lock.only_one(tmp_path):
        busy = pytest.raises(RunError, match="is in use: another process")
        with busy, lock.only_one(tmp_path):
            raise AssertionError("two hold it")
    with lock.only_one(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_a_lock_of_another_user_is_seen(tmp_path):
    """The folder may be written by all, and the lock by who made it."""
    os.chmod(tmp_path, 0o777)
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o001:
            os.chmod(folder, folder.stat().st_mode | 0o011)
    with lock.only_one(tmp_path):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setresuid(65534, 65534, 65534)
                with lock.only_one(tmp_path):
                    code = 2
            except RunError as error:
                code = 0 if "is in use" in str(error) else 3
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_in_the_place_of_a_runs_is_left_alone(tmp_path, link):
    """Another run, or a link to one, is put there while the first goes on."""
    run, other = tmp_path / "run", tmp_path / "other"
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0))
    space = rl_ebm.TokenSpace(3, 2)
    rl_ebm.train(rl_ebm.EBM(space, scores), "ppo", other, network="tabular", steps=1)
    before, calls = contents(other), []

    def reward(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            run.rename(tmp_path / "moved")
            if link:
                run.symlink_to(other)
            else:
                shutil.copytree(other, run)
        return scores[space.prefix_indices(tokens)[:, -1]]

    ebm = rl_ebm.EBM(space, reward)
    with pytest.raises(RunError, match=r"run is gone: it was deleted or moved"):
        rl_ebm.train(ebm, "soft-q", run, network="tabular", steps=20, solve=False)
    assert len(calls) >= 3
    assert contents(run) == before
    assert not (tmp_path / "moved" / "report.json").exists()
