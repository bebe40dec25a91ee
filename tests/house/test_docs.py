"""The pages in docs/ say what is there: pictures, notation, names, examples."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from checkout import ROOT

import rl_ebm.tokens
from benchmarks.architecture import fill
from benchmarks.support.rooms import read_modules, report

PAGES = sorted((ROOT / "docs").glob("*.md"))
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")
# All of the notation: the symbols that the design declares.
SYMBOLS = [
    "A",
    "T",
    "tokens",
    "lengths",
    "prompts",
    "prompt_ids",
    "reward",
    "beta",
    "log_ref",
    "r",
    "q",
    "v",
    "log_pi",
    "log_z",
    "logits",
]


def test_the_architecture_page_is_as_the_library_is():
    assert fill(ARCHITECTURE) == ARCHITECTURE, "run python -m benchmarks.architecture"


def test_every_room_is_explained():
    rows = "\n".join(re.findall(r"^\| (`.*?) \|", ARCHITECTURE, re.M))
    rooms = set(report(read_modules()).rooms) - {"", "__main__", "version"}
    assert rooms <= set(re.findall(r"`(\w+)`", rows))


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_the_notation_has_every_symbol_once(symbol):
    table = rl_ebm.tokens.__doc__
    assert len(re.findall(rf"^(?:``\w+``, )?``{symbol}``", table, re.M)) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_is_there(page):
    names = re.findall(r"`rl_ebm((?:\.\w+)+)(?:\([^`]*\))?`", page.read_text("utf-8"))
    assert names
    for name in names:
        found = rl_ebm
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                found = importlib.import_module(f"{found.__name__}.{part}")
            else:
                found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S))
]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs(example, tmp_path):
    """In a process of its own, where nothing is registered yet."""
    command = [sys.executable, "-W", "error", "-c", example]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
