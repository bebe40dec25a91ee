"""What tests of runs share."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The run that a file's own fixture ``made`` has made, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def saves_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a disk takes that others keep busy, which else puts checkpoints off."""
    # By its name: a library that a conftest.py imports comes before its calls can be checked.
    monkeypatch.setattr("rl_ebm.training.pace.FREE", math.inf)
