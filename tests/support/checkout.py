"""Copies of the source tree as users get them, and Python processes that see only these."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IN_GIT = (
    ".ci", ".github", "agents", "benchmarks", "docs", "envs", "rl_ebm", "tests", ".gitignore",
    "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "constraints-lowest.txt",
    "pyproject.toml", "setup.py",
)  # fmt: skip
ENTRIES = ("agents", "envs")


def copy_tree(target: Path, in_place: str) -> Path:
    """The tree without its built parts.

    Args:
        in_place: what stands where rl_ebm/agents and rl_ebm/envs link to their folders: "links";
            "files", as git leaves them on Windows; or "nothing", as some archives do.
    """
    made = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in IN_GIT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=made)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, target)
    for name in ENTRIES:
        entry = target / "rl_ebm" / name
        if entry.is_symlink() or entry.is_file():
            entry.unlink()
        if in_place == "links":
            entry.symlink_to(Path("..", name), target_is_directory=True)
        elif in_place == "files":
            entry.write_text(f"../{name}")
    return target


def start(
    *args: str | Path, at: Path, path: Path | None = None, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """A Python that runs in a folder, with at most one more folder on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": "" if path is None else str(path)}
    return subprocess.run(
        [str(python), *map(str, args)], cwd=at, env=env, capture_output=True, text=True
    )


def run(
    *args: str | Path, at: Path, path: Path | None = None, python: str | Path = sys.executable
) -> str:
    """What it prints.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = start(*args, at=at, path=path, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(command: str, *args: str | Path, at: Path, python: str | Path = sys.executable) -> str:
    """pip into an environment, with what is installed here alone: no index, nothing to build in."""
    own = ("--no-deps", "--no-build-isolation", "--no-index")
    of = ("-m", "pip", "--disable-pip-version-check", "--python", python)
    return run(*of, command, *own, *args, at=at)
