"""Put the results into the README: what stands behind ``<!-- NAME -->`` is ``results/NAME``, or
what the library itself says (the table of figures).

python -m benchmarks.readme            # after any of the other scripts
python -m benchmarks.readme --check    # exit code 1 if the README is not up to date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rl_ebm.verification.reading import markdown

RESULTS = Path(__file__).parents[1] / "results"
README = Path(__file__).parents[2] / "README.md"
MADE = {"figures.md": markdown}


def filled(text: str) -> str:
    """The README with every result in its place."""

    def put(match: re.Match[str]) -> str:
        name = match[1]
        result = MADE[name]() if name in MADE else (RESULTS / name).read_text().strip("\n")
        body = f"```\n{result}\n```" if name.endswith(".txt") else f"\n{result}"
        return f"<!-- {name} -->\n{body}\n\n<!-- end -->"

    block = r"<!-- (\w+\.(?:md|txt)) -->\n(?:(?!<!-- ).*\n)*?<!-- end -->"
    return re.sub(block, put, text)


def main() -> None:
    text = README.read_text()
    new = filled(text)
    if "--check" in sys.argv:
        sys.exit(new != text)
    README.write_text(new)
