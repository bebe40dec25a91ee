"""The checks on a card that is not there, in a process of its own: all of it has that card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("checks_on_card.py")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_everything_holds_on_a_card_that_is_not_there(which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", which, str(CHECKS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    said = done.stdout.splitlines()[-1]
    assert " passed" in said or " skipped" in said, said
