"""The cases of door_cases.py, in a process where no annotation is checked: as users call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_cases():
    args = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*args, str(TESTS / "door_cases.py")],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
