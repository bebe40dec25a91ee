"""A copy of a finished run for every test that spoils one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The run that a file's own fixture ``made`` has made, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "run"))
