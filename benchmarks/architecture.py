"""Writes what docs/architecture.md quotes: the rooms as they are, and the notation.

python -m benchmarks.architecture
"""

from __future__ import annotations

import re
from pathlib import Path

import rl_ebm.tokens
from benchmarks.support.rooms import read_modules, report, text

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def notation() -> str:
    """The table in the docstring of ``rl_ebm.tokens``, as it stands."""
    lines = (rl_ebm.tokens.__doc__ or "").splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("====")]
    return "\n".join(lines[rules[0] : rules[-1] + 1])


def fill(page: str) -> str:
    """The page with its two blocks as they are now."""
    for name, block in (("rooms", text(report(read_modules()))), ("notation", notation())):
        filled = f"<!-- {name} -->\n```\n{block}\n```\n<!-- end -->"
        page = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, f=filled: f, page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text("utf-8")), "utf-8")
