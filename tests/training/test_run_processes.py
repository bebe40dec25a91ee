"""One process at a time trains into a folder; signals, and folders that go, lose nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from run_cases import (
    HANGS,
    NETWORK,
    finished_run,
    load_state,
    refused,
    small_options,
    start,
    train_args,
)

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.files import RunError
from rl_ebm.files.lock import only_one
from rl_ebm.training import stopping
from rl_ebm.training.run import train

SPACE = rl_ebm.TokenSpace(3, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("files") / "run")


# One process --------------------------------------------------------------------------------------


def test_another_process_is_told_which_one_trains(run, tmp_path, capsys):
    code = (
        "import sys, pathlib; from rl_ebm.files.lock import only_one\n"
        "with only_one(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    for args in (
        ["train", "--resume", run, "--steps", 9],
        [*train_args(steps=1), "--out", run, "--overwrite"],
    ):
        before = sorted(run.iterdir())
        assert f"process {holder.pid} is training" in refused(capsys, *args)
        assert sorted(run.iterdir()) == before
    assert main(["verify", str(run)]) == 0  # reading needs no lock
    holder.kill()  # and the lock dies with its process
    holder.communicate()
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
    assert not (run / "run.lock").exists()


def test_the_lock_holds_among_threads_and_is_free_again(tmp_path):
    busy = pytest.raises(RunError, match=f"process {os.getpid()} ")
    with only_one(tmp_path), busy, only_one(tmp_path):
        raise AssertionError
    with only_one(tmp_path):
        assert int((tmp_path / "run.lock").read_text()) == os.getpid()
    assert os.listdir(tmp_path) == []


# Signals and folders that go ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_between_steps_saves_what_was_trained(number, code, tmp_path, capsys):
    """No checkpoint is due for an hour: what is saved, the signal has saved."""
    from rl_ebm.agents import AGENTS

    agent, calls = AGENTS["soft-q"].agent, []
    real = agent.update

    def update(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:  # a terminal hangs up twice, a scheduler tells groups too
                os.kill(os.getpid(), number)
        return real(*args)

    run, whole = tmp_path / "a run", tmp_path / "whole"
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent, "update", update)
            args = train_args(steps=8, checkpoint_every=3600)
            assert main([*args, "--out", str(run)]) == code
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"stopped at step 5, which is kept: rl-ebm train --resume '{run}' goes on" in err
    assert load_state(run)["step"] == 5
    assert main(["train", "--resume", str(run)]) == 0
    assert main([*args, "--out", str(whole)]) == 0
    from run_cases import differences

    assert differences(load_state(whole), load_state(run)) == []


@pytest.fixture
def usual():
    """The usual handlers: a process in the background may have been told to ignore some."""
    handlers = dict.fromkeys(stopping.ENDS, signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield handlers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("first", "second", "later", "acts"),
    [
        (signal.SIGINT, signal.SIGINT, False, True),
        (signal.SIGTERM, signal.SIGINT, False, True),
        (signal.SIGTERM, signal.SIGTERM, False, False),
        (signal.SIGTERM, signal.SIGTERM, True, True),
        (signal.SIGHUP, signal.SIGHUP, True, False),
        (signal.SIGHUP, signal.SIGTERM, False, False),
    ],
)
def test_which_second_signals_act_at_once(first, second, later, acts, usual, monkeypatch):
    sent = []
    monkeypatch.setattr(stopping.os, "kill", lambda pid, number: sent.append((pid, number)))

    def work() -> None:
        with stopping.stops_between_steps() as asked:
            signal.raise_signal(first)
            assert asked.signal == first
            monkeypatch.setattr(stopping, "AGAIN", 0.0 if later else 1e9)
            signal.raise_signal(second)
            assert sent == ([(os.getpid(), second)] if acts else [])
            for number, handler in usual.items():
                assert (signal.getsignal(number) == handler) == acts
            asked.kept(Path("runs/a b"), 7, complete=False)

    with pytest.raises((KeyboardInterrupt, stopping.Terminated)) as stop:
        work()
    told = str(stop.value) if first == signal.SIGINT else stop.value.told
    assert "step 7, which is kept: rl-ebm train --resume 'runs/a b' goes on" in told
    assert {number: signal.getsignal(number) for number in usual} == usual


@pytest.mark.parametrize("number", stopping.ENDS)
def test_what_is_told_to_end_is_told_once(number, usual):
    def work() -> None:
        with stopping.ending_raises():
            try:
                signal.raise_signal(number)
            finally:
                for other in stopping.ENDS:
                    signal.raise_signal(other)

    with pytest.raises(stopping.Terminated) as stop:
        work()
    assert stop.value.code == 128 + number
    assert {number: signal.getsignal(number) for number in usual} == usual


def test_a_signal_while_it_is_verified_does_not_wait(tmp_path, capsys):
    """The last look may take long: the run is saved at once, and goes on with that look."""
    from rl_ebm.training import loop as training

    def verify(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal waits")

    run, args = tmp_path / "run", train_args(steps=4, checkpoint_every=3600, eval_every=3600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "verify", verify)
        assert main([*args, "--out", str(run)]) == 143
    assert "--resume" in capsys.readouterr().err
    state = load_state(run)
    assert (state["step"], state["complete"]) in ((0, False), (4, False))
    assert main(["train", "--resume", str(run)]) == 0
    assert load_state(run)["complete"]


@pytest.mark.parametrize("number", stopping.ENDS)
def test_a_signal_while_a_look_is_written_waits_for_the_end_of_that(
    number, usual, tmp_path, capsys
):
    """The first look's row makes new columns, and metrics.csv anew."""
    from rl_ebm.training import metrics_csv

    real, sent = metrics_csv.read_rows, []

    def read_rows(*args):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(*args)

    run, args = tmp_path / "run", train_args(steps=8, checkpoint_every=3600, eval_every=3600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_csv, "read_rows", read_rows)
        assert main([*args, "--out", str(run)]) == 128 + number
    err = capsys.readouterr().err
    step = load_state(run)["step"]
    assert sent
    assert 0 < step < 8
    assert f"stopped at step {step}, which is kept: rl-ebm train --resume {run} goes on" in err
    assert main(["train", "--resume", str(run)]) == 0
    assert load_state(run)["complete"]


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    ebm = rl_ebm.EBM(SPACE, torch.zeros(27))
    failed = []

    def work() -> None:
        try:
            train(ebm, out=tmp_path / "r", options=small_options("soft-q"), network=NETWORK,
                  steps=2)  # fmt: skip
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
    assert load_state(tmp_path / "r")["step"] == 2


def test_a_folder_that_is_deleted_while_it_runs(tmp_path, capsys):
    from rl_ebm.agents import AGENTS

    agent, calls = AGENTS["soft-q"].agent, []
    real = agent.update
    run = tmp_path / "run"

    def update(*args):
        calls.append(args)
        if len(calls) == 3:
            shutil.rmtree(run)
        return real(*args)

    for log_every in (1, 100):
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent, "update", update)
            args = train_args(steps=6, checkpoint_every=1e-9, log_every=log_every)
            assert f"the folder {run} is gone" in refused(capsys, *args, "--out", run)


@pytest.mark.slow
def test_sigterm_of_a_process(tmp_path):
    run = tmp_path / "run"
    args = train_args(steps=100_000, checkpoint_every=3600)
    process = start([*args, "--out", str(run)])
    deadline = time.monotonic() + HANGS
    while not (run / "state.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert load_state(run)["step"] > 0
