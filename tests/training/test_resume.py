"""Runs that are killed at any time and go on end as runs that were not."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from itertools import count, product
from pathlib import Path

import pytest
import torch
from run_cases import (
    HANGS,
    STATES,
    differences,
    killed_before_operation,
    load_state,
    refused,
    rows,
    snapshot,
    start,
    train_args,
)
from safetensors.torch import load_file

from rl_ebm.agents import AGENTS
from rl_ebm.cli import main

pytestmark = pytest.mark.usefixtures("saves_at_each_step")

STEPS = 8
EVERY_STEP = {"steps": STEPS, "checkpoint_every": 1e-9, "log_every": 2, "eval_every": 1e-9}


def check_whole(run: Path, reference: Path) -> None:
    """Policy, agent, generator and counts bit for bit; logs that never go back."""
    state, want = load_state(run), load_state(reference)
    assert differences(want, state) == []
    weights = load_file(run / "policy.safetensors")
    assert differences(dict(want["policy"]), weights, "policy") == []
    steps = [int(row["step"]) for row in rows(run)]
    assert steps == sorted(steps)
    assert not list(run.glob("*.part")), "leftovers of a write that was cut short"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, one for each agent."""
    made: dict[str, Path] = {}

    def make(agent: str) -> Path:
        if agent not in made:
            made[agent] = tmp_path_factory.mktemp("whole") / "run"
            assert main([*train_args(agent, **EVERY_STEP), "--out", str(made[agent])]) == 0
        return made[agent]

    return make


def go_on(run: Path, agent: str) -> list[str]:
    if (run / "config.json").exists():
        return ["train", "--resume", str(run)]
    return [*train_args(agent, **EVERY_STEP), "--out", str(run), "--overwrite"]


def kill_and_resume(run: Path, agent: str, operations) -> int:
    """Kill again and again, before the given numbers of file operations; how often."""
    for killed, number in enumerate(operations):
        assert killed < 40, "the run does not get on"
        if not killed_before_operation(number, go_on(run, agent), run):
            return killed
    raise AssertionError("not enough operations")


@pytest.mark.parametrize("agent", ["soft-q", "exact"])  # all of them: test_kills.py
def test_kill_resume_kill_resume_is_bit_identical(agent, whole, tmp_path):
    reference = whole(agent)
    rng = random.Random(agent)
    run = tmp_path / "run"
    killed = kill_and_resume(run, agent, (rng.randrange(6, 40) for _ in count()))
    assert killed >= 2
    check_whole(run, reference)


@pytest.mark.slow
def test_killed_before_every_single_file_operation(whole, tmp_path):
    agent = "soft-q"  # a replay buffer and an optimiser: most of all in its checkpoint
    reference = whole(agent)
    for number in count():
        run = tmp_path / f"run{number}"
        if not killed_before_operation(number, go_on(run, agent), run):
            break
        assert not killed_before_operation(10**9, go_on(run, agent), run)
        check_whole(run, reference)
        shutil.rmtree(run)
    assert number > 30


def one_subprocess_kill(run: Path, args: list[str], delay: float, watched: str) -> None:
    process = start(args)
    deadline = time.monotonic() + HANGS
    while not (run / watched).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def subprocess_case(agent: str, tmp_path: Path, kills: list[tuple[float, str]]) -> None:
    flags = train_args(agent, steps=150, checkpoint_every=0.02)
    reference, run = tmp_path / "whole", tmp_path / "run"
    assert main([*flags, "--out", str(reference)]) == 0
    one_subprocess_kill(run, [*flags, "--out", str(run)], *kills[0])
    for delay, watched in kills[1:]:
        (run / watched).touch()
        one_subprocess_kill(run, ["train", "--resume", str(run)], delay, watched)
    assert main(["train", "--resume", str(run)]) == 0
    check_whole(run, reference)


@pytest.mark.slow
def test_sigkill_of_a_process(tmp_path):  # at random moments, every agent: test_kills.py
    subprocess_case("soft-q", tmp_path, [(0.1, "state.pt"), (3.0, "config.json")])


def test_resume_without_a_checkpoint_starts_at_step_0(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole("soft-q"), run)
    (run / "state.pt").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    check_whole(run, whole("soft-q"))
    assert [row["step"] for row in rows(run)].count("0") == 1


@pytest.mark.parametrize("agent", STATES)  # all of them: test_kills.py
def test_a_finished_run_says_so_and_nothing_is_touched(agent, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole(agent), run)
    before = snapshot(run)
    assert main(["train", "--resume", str(run)]) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--steps", str(STEPS - 1)]) == 0
    assert snapshot(run) == before


def test_resume_with_steps_extends(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole("soft-q"), run)
    assert main(["train", "--resume", str(run), "--steps", str(STEPS + 5)]) == 0
    state = load_state(run)
    assert state["step"] == STEPS + 5
    assert state["tokens"] == 3 * state["reward_calls"] == 3 * 16 * (STEPS + 5)
    steps = [int(row["step"]) for row in rows(run)]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS + 5
    assert main(["train", "--resume", str(run)]) == 0  # the new limit was written down
    assert load_state(run)["step"] == STEPS + 5


# Each checkpoint opens and renames both files: at step 0, after each step, and at the end.
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("policy.safetensors", 2 * STEPS),
        ("policy.safetensors", 2 * STEPS + 1),
        ("state.pt", 2 * STEPS + 1),
        ("metrics.csv", 0),
        ("config.json", 1),
    ],
)
def test_killed_in_the_middle_of_a_file(name, number, whole, tmp_path):
    """The weights of the last checkpoint are not written, say: resuming must derive them."""
    run = tmp_path / "run"
    assert killed_before_operation(number, go_on(run, "exact"), run, name)
    assert main(go_on(run, "exact")) == 0
    check_whole(run, whole("exact"))


def test_finished_by_a_checkpoint_before_the_last_evaluation(whole, tmp_path):
    """A checkpoint at the last step, then a kill: the final report must not be lost."""
    run = tmp_path / "run"
    shutil.copytree(whole("soft-q"), run)
    # As a kill right after the loop's own checkpoint of the last step leaves it.
    state = load_state(run)
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    state["metrics_rows"], state["complete"] = len(lines) - 2, False
    torch.save(state, run / "state.pt")
    (run / "metrics.csv").write_text("".join(lines[:-1]))
    assert main(["train", "--resume", str(run)]) == 0
    last = [row for row in rows(run) if row["exact/tv"]][-1]
    assert last["step"] == str(STEPS)


def test_metrics_beyond_the_checkpoint_are_cut(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole("soft-q"), run)
    state = load_state(run)
    kept = rows(run)[: state["metrics_rows"]]
    with open(run / "metrics.csv", "a") as file:
        file.write("99,1,1,1\n100,1.5")  # a row too many, and a line cut short
    (name,) = state["event_sizes"]
    mark = name.rpartition(".")[2][:8]
    later = run / f"events.out.tfevents.9999999999.after.checkpoint.7.{mark}01234567"
    later.write_bytes(b"junk")
    others = [run / f"events.out.tfevents.9999999999.host.7.{end}" for end in ("0", "0.v2", "123")]
    for at, end in product(("1700000000", "9999999999"), ("deadbeef", "deadbeef01234567")):
        others.append(run / f"events.out.tfevents.{at}.otherhost.1.{end}")  # another run's
    for path in others:
        path.write_bytes(b"mine")
    sizes = state["event_sizes"]
    for name in sizes:
        with open(run / name, "ab") as file:
            file.write(b"half a record")
    assert main(["train", "--resume", str(run), "--steps", str(STEPS + 2)]) == 0
    assert rows(run)[: len(kept)] == kept
    assert all(int(row["step"]) <= STEPS + 2 for row in rows(run))
    assert not later.exists()
    assert [path.read_bytes() for path in others] == [b"mine"] * len(others)
    for name, size in sizes.items():
        assert (run / name).stat().st_size == size


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"has 0 of the \d+ rows that it had at the run's checkpoint: put the whole file"),
        (b"step,seconds\r\n1,0.5\r\n", r"has 1 of the .*, or delete it to go on with a new one"),
        (b"\xff\n", "is damaged"),
    ],
)
def test_metrics_that_lost_rows_are_told_before_anything_is_changed(
    data, words, whole, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole("soft-q"), run)
    (run / "metrics.csv").write_bytes(data)
    (run / "certificate.json").write_text("{}")
    before = snapshot(run)
    said = refused(capsys, "train", "--resume", run, "--steps", STEPS + 2)
    assert re.search(rf"metrics\.csv {words}", said)
    assert snapshot(run) == before
    assert main(["train", "--resume", str(run)]) == 0  # it is finished: they are not needed
    (run / "metrics.csv").unlink()
    assert main(["train", "--resume", str(run), "--steps", str(STEPS + 2)]) == 0
    assert [row["step"] for row in rows(run)][-1] == str(STEPS + 2)


def test_a_process_that_is_killed_leaves_a_run_that_load_reads(whole, tmp_path):
    run = tmp_path / "run"
    assert killed_before_operation(6, go_on(run, "soft-q"), run, "policy")
    step = load_state(run)["step"]
    assert step == 3
    assert main(["verify", str(run)]) == 0


def test_an_interrupt_ends_with_130_and_a_run_that_goes_on(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    real, calls = AGENTS["soft-q"].agent.update, []

    def update(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(AGENTS["soft-q"].agent, "update", update)
    assert main(go_on(run, "soft-q")) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "rl-ebm train --resume" in err
    assert load_state(run)["step"] == 4
    assert main(["train", "--resume", str(run)]) == 0
    check_whole(run, whole("soft-q"))


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_a_run_that_goes_on(tmp_path):
    run = tmp_path / "run"
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start([*train_args(steps=3000, checkpoint_every=0.05), "--out", str(run)])
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + HANGS
    while not (run / "state.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "--resume" in err
    step = load_state(run)["step"]
    assert step < 3000
    assert main(["train", "--resume", str(run), "--steps", str(step + 1)]) == 0


def test_differences_sees_one_bit():
    """The comparison above is not vacuous."""
    a = {"policy": {"w": torch.ones(2)}, "seconds": 1.0, "step": 3}
    b = {"policy": {"w": torch.ones(2)}, "seconds": 2.0, "step": 3}
    assert differences(a, b) == []
    b["policy"]["w"][1] += 2**-23
    assert differences(a, b) == ["state.policy.w"]
    assert differences(a, a | {"step": 4})
    assert differences({"x": [1]}, {"x": [1, 2]})
