"""Tiny runs for the tests of the loop and the command line, and ways to kill them."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.cli import main
from rl_ebm.networks.backbone import TransformerConfig

NETWORK = TransformerConfig(layers=1, heads=2, dim=8, hidden=8)
NETWORK_FLAGS = ["--layers", "1", "--heads", "2", "--dim", "8", "--hidden", "8"]
TASK_FLAGS = ["--task", "random", "--vocab-size", "3", "--max-length", "3"]
SMALL_BATCH = {
    name: 16 for name, entry in AGENTS.items() if "batch_size" in entry.config.__dataclass_fields__
}
# Each keeps a state of its own between two steps; what holds for these holds for the others,
# which are tried with the slow tests.
STATES = ("soft-q", "trajectory-balance", "dpg", "sampled-teacher", "ppo", "exact")
AGENT_PARAMS = [a if a in STATES else pytest.param(a, marks=pytest.mark.slow) for a in AGENTS]
every_agent = pytest.mark.parametrize("agent", AGENT_PARAMS)
REPLAY = ["--tau", "0.1", "--replay-size", "64", "--replay-batch", "16"]

# State that a clock decides, or that says where the logs end.
CLOCKED = {"seconds", "metrics_rows", "event_sizes"}


def train_args(agent: str = "soft-q", **flags: Any) -> list[str]:
    """Arguments of a tiny ``rl-ebm train``; soft-q with a target network and replay."""
    args = ["train", "--agent", agent, *TASK_FLAGS, *NETWORK_FLAGS]
    if agent in SMALL_BATCH:
        args += ["--batch-size", str(SMALL_BATCH[agent])]
    if agent == "soft-q":
        args += REPLAY
    for name, value in flags.items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    return args


def small_options(agent: str, **options: Any) -> Any:
    """The options of an agent, with a tiny batch."""
    if agent in SMALL_BATCH:
        options = {"batch_size": SMALL_BATCH[agent]} | options
    return AGENTS[agent].config(**options)


def load_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "state.pt", weights_only=True)
    return state


def differences(a: Any, b: Any, path: str = "state") -> list[str]:
    """Where two nested states differ in a bit, clocked entries left out."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        kept = [k for k in a if not (path == "state" and k in CLOCKED)]
        return [d for k in kept for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: lengths"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}[{i}]")]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} and {b!r}"]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and its bytes."""
    return {
        p.name: (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.iterdir())
        if p.is_file()
    }


def rows(run: Path) -> list[dict[str, str]]:
    """All of metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


HANGS = 1800.0
"""seconds after which a process that has not ended hangs: no measure of speed, on any machine"""


def start(args: list[str], **kwargs: Any) -> subprocess.Popen[str]:
    """``python -m rl_ebm`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "rl_ebm", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def killed_before_operation(number: int, args: list[str], run: Path, name: str = "") -> bool:
    """Run a command in a forked child that is killed before its n-th file operation on a run.

    Args:
        number: from 0.
        args: of the command line.
        run: the run directory.
        name: how the names of the files begin whose operations count; the event files, which
            are opened for every record, count only so.

    Returns:
        Whether it was killed; False where it ended by itself, with exit code 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking where threads are: the child starts no more
        pid = os.fork()
    if pid == 0:
        _die_at(number, run, name)
        _become(lambda: main(args))
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _become(command: Callable[[], int]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        code = command()
    except BaseException:
        traceback.print_exc()
        code = 70
    os._exit(code)


def _die_at(number: int, run: Path, name: str) -> None:
    """Writes, renames, removals and cuts in the run directory count; reads do not."""
    left = [number]

    def count(event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir"):
            return
        if event == "open" and (not isinstance(args[1], str) or set(args[1]) <= set("rbt")):
            return
        if not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        path = Path(os.fsdecode(args[0]))
        if not name and path.name.startswith("events."):
            return
        if path.is_relative_to(run) and path.name.startswith(name):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def refused(capsys, *args: object) -> str:
    """The one sentence of a command that fails."""
    capsys.readouterr()
    code = main(list(map(str, args)))
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.startswith("rl-ebm: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


def finished_run(folder: Path) -> Path:
    """A run of three steps on a table of 27 responses."""
    scores = torch.randn(27, generator=torch.Generator().manual_seed(1))
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(3, 3), scores)
    rl_ebm.train(ebm, out=folder, options=small_options("soft-q"), network=NETWORK, steps=3)
    return folder
