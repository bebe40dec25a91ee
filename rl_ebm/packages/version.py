"""Which release this is."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

UNKNOWN = "0+unknown"


def find_version(package: Path = Path(__file__).parents[1]) -> str:
    """That of the checkout which a package stands in, else of what is installed, else unknown.

    The checkout goes first: on PYTHONPATH it hides another release that is installed.
    """
    try:
        project = tomllib.loads((package.parent / "pyproject.toml").read_text("utf-8"))["project"]
        if project["name"] == "rl-ebm":
            return str(project["version"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no checkout of ours
    try:
        return version("rl-ebm")
    except PackageNotFoundError:
        return UNKNOWN


VERSION = find_version()
