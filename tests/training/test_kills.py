"""Forty processes killed at random moments, over all agents: what goes on ends to the last bit.

Beside ``test_resume.py``, which kills before chosen file operations: here the moment is drawn, as
a share of the time that the run took, so that a kill falls anywhere, within a write as well.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
from run_cases import _become, differences, load_state, rows, train_args
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from rl_ebm.agents import AGENTS
from rl_ebm.cli import main

STEPS = 40
EACH = math.ceil(40 / len(AGENTS))
"""kills of each agent's run"""
# Many checkpoints, so that many kills hit one; evaluations go by the clock, so only the first and
# the last step have one.
FLAGS = {"steps": STEPS, "checkpoint_every": 0.01, "log_every": 5, "eval_every": 1e6}
CLOCKED = ("seconds", "charts/tokens_per_second")


def start(args: list[str]) -> int:
    """Run a command in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking where threads are: the child starts no more
        pid = os.fork()
    if pid == 0:
        _become(lambda: main(args))
    return pid


def wait(pid: int) -> int:
    """Its exit code; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_after(delay: float, args: list[str]) -> bool:
    """Kill a command after so many seconds; whether it was still running."""
    pid = start(args)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)  # a child that has ended waits for us: nothing happens to it
    code = wait(pid)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def go_on(run: Path, whole: list[str]) -> list[str]:
    if (run / "config.json").exists():
        return ["train", "--resume", str(run)]
    return [*whole, "--out", str(run), "--overwrite"]


def figures(run: Path) -> dict[tuple[int, str], str]:
    """Every figure of metrics.csv that no clock decides, by step and column."""
    found = rows(run)
    steps = [int(row["step"]) for row in found]
    assert steps == sorted(steps)
    return {
        (int(row["step"]), name): value
        for row in found
        for name, value in row.items()
        if value and name not in CLOCKED
    }


def scalars(run: Path) -> dict[tuple[int, str], bytes]:
    """Every scalar of all event files, by global tokens and tag, as TensorBoard keeps it."""
    found = {}
    for path in sorted(run.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if (
                    value.metadata.plugin_data.plugin_name in ("", "scalars")
                    and value.tag not in CLOCKED
                ):
                    key = event.step, value.tag
                    data = value.tensor.SerializeToString()
                    assert found.setdefault(key, data) == data, f"{key} is there twice"
    return found


def check_same(found: Mapping, want: Mapping, due: set[int], last: int) -> None:
    """What stands at a due place is there, and all that is in both is the same to the last bit.

    Exact figures before the end, and rows between due steps, are written when time has passed:
    they may be in one of the two alone.
    """
    both = found.keys() & want.keys()
    assert {k: found[k] for k in both} == {k: want[k] for k in both}
    exact = {key for key in want if key[1].startswith(("exact/", "eval/"))}
    needed = {key for key in want.keys() - exact if key[0] in due}
    needed |= {key for key in exact if key[0] == last}
    assert needed
    assert needed <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_killed_at_random_moments(agent, tmp_path):
    flags = train_args(agent, **FLAGS)
    whole, run = tmp_path / "whole", tmp_path / "run"
    began = time.monotonic()
    assert wait(start([*flags, "--out", str(whole)])) == 0
    took = time.monotonic() - began
    rng = random.Random(f"kills {agent}")
    kills = tries = 0
    while kills < EACH:
        tries += 1
        assert tries < 20 * EACH, "the run ends before it can be killed"
        state = run / "state.pt"
        if state.exists() and load_state(run)["step"] > STEPS - 5:
            (run / "config.json").unlink(
                missing_ok=True
            )  # all but done: a new run for the kills that are left
        kills += killed_after(rng.uniform(0, took), go_on(run, flags))
    assert wait(start(go_on(run, flags))) == 0
    assert differences(load_state(whole), load_state(run)) == []
    weights = load_file(run / "policy.safetensors")
    assert differences(dict(load_state(whole)["policy"]), weights, "policy") == []
    want = figures(whole)
    steps = set(range(FLAGS["log_every"], STEPS + 1, FLAGS["log_every"]))
    check_same(figures(run), want, steps, STEPS)
    # TensorBoard's x are global tokens.
    tokens = {step: int(want[step, "tokens"]) for step in steps}
    check_same(scalars(run), scalars(whole), set(tokens.values()), tokens[STEPS])
    assert not list(run.glob("*.part")), "leftovers of a write that was cut short"
