"""TRL's GRPO at two releases, on both sides of the change of its default in 1.10.

    python -m benchmarks.frameworks.versions                        # 1.9.2 and 1.16.0
    python -m benchmarks.frameworks.versions --releases 1.8.0 1.16.0
    python -m benchmarks.frameworks.versions --folder ~/venvs       # keeps the environments there

Each release gets an environment of its own, in which :mod:`benchmarks.frameworks.grpo` audits it.
Prints what each ships, and every row that is not in both with the same limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[2]
MORE = ("requests", "peft")
"""what releases before 1.16 import, and do not ask for"""
Line = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    releases: tuple[str, ...] = ("1.9.2", "1.16.0")
    """of TRL"""
    folder: Path | None = None
    """where the environments are made, and found again; None for one that is deleted"""
    torch: str = "torch"
    """what pip installs as torch: its build"""


def environment(folder: Path, release: str, torch: str) -> Path:
    """The interpreter of an environment with this project and a release of TRL."""
    home = folder / f"trl-{release}"
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (home / "made").is_file():
        venv.create(home, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, ROOT, f"trl=={release}", *MORE], check=True)
        (home / "made").touch()
    return python


def rows_of(python: Path) -> list[Line]:
    """What that environment's TRL converges to."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    asked = [python, "-m", "benchmarks.frameworks.grpo"]
    done = subprocess.run(asked, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    found: list[Line] = json.loads(done.stdout.splitlines()[-1])
    return found


def differences(first: list[Line], second: list[Line]) -> list[str]:
    """Rows that differ between two releases: in default or limit, or that one does not have."""
    tables = [{json.dumps(x["options"]): x for x in lines} for lines in (first, second)]
    found = []
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        a, b = (_told(table.get(key)) for table in tables)
        if a != b:
            found.append(f"{key}\n    {first[0]['version']}: {a}\n    {second[0]['version']}: {b}")
    return found


def _told(line: Line | None) -> str:
    if line is None:
        return "not there"
    end = line["how"] if line["tv"] is None else f"total variation {line['tv']:.4f} from the EBM"
    edge = ", on the boundary" if line["degenerate"] else ""
    return f"{end}{edge}{' (shipped)' if line['default'] else ''}"


def main(options: Options) -> None:
    """Both releases, and what is different."""
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        tables = [rows_of(environment(folder, r, options.torch)) for r in options.releases]
    for lines in tables:
        print(f"TRL {lines[0]['version']} ships")
        for x in lines:
            if x["default"]:
                print(f"    {x['options']}: {_told(x)}")
    for before, after in pairwise(tables):
        print("different:")
        print("\n".join(f"  {x}" for x in differences(before, after)) or "  nothing")


if __name__ == "__main__":
    main(tyro.cli(Options, args=sys.argv[1:], description=__doc__))
