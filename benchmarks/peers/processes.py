"""Starts one run in a process of its own, and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.entries import CONTENDERS
from benchmarks.peers.watch import DRAWN
from benchmarks.peers.worker import NOT_INSTALLED
from rl_ebm.studies.bench import Problem

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Run:
    """One contender on one task with one seed."""

    contender: str
    problem: Problem
    seed: int
    seconds: float
    looks: int
    threads: int
    samples: int = DRAWN


def command(run: Run, interpreter: str, out: Path) -> list[str]:
    """What starts a worker."""
    return [
        interpreter,
        "-m",
        "benchmarks.peers.worker",
        f"--contender={run.contender}",
        f"--task={run.problem.name}",
        f"--beta={run.problem.beta}",
        f"--seed={run.seed}",
        f"--seconds={run.seconds}",
        f"--looks={run.looks}",
        f"--threads={run.threads}",
        f"--samples={run.samples}",
        f"--out={out}",
    ]


def start(run: Run, interpreter: str) -> dict[str, Any] | str:
    """Do a run and wait for it: what its worker wrote, or one line that says why there is none."""
    threads = str(run.threads)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        try:
            done = subprocess.run(
                command(run, interpreter, out),
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            return f"failed: {interpreter} does not start ({error.strerror})"
        if done.returncode == NOT_INSTALLED:
            return CONTENDERS[run.contender].how_to_install
        if done.returncode or not out.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            return f"failed with exit code {done.returncode}: {last.strip()[:300]}"
        found: dict[str, Any] = json.loads(out.read_text())
        return found
