"""The house keeps its rules: who imports whom, how long a file is, what stands where.

The layers are contracts of import-linter in pyproject.toml. What it cannot say is read here.
"""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT

import rl_ebm
from benchmarks.support.rooms import SCRIPTS, read_modules, report, room_of

MODULES = read_modules()
MAX_LINES, MAX_FUNCTION = 400, 60

# What lives elsewhere: room, and the packages that it must leave alone.
FORBIDDEN = {
    "tokens": {"torch.nn", "torch.optim"},
    "soft_bellman": {"torch.nn", "torch.optim", "logging"},
    "divergences": {"torch.nn", "torch.optim", "logging"},
    "automata": {"torch.nn", "torch.optim", "logging"},
    "bounds": {"torch.nn", "torch.optim", "logging"},
    "statistics": {"torch.nn", "torch.optim", "logging"},
    "agents": {"time", "pathlib", "os", "io", "shutil", "logging"},
}


def outer_imports(path: Path) -> set[str]:
    """Full names of all that is imported from other libraries, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] != "rl_ebm"}


@pytest.mark.parametrize("module", MODULES)
def test_each_room_leaves_alone_what_lives_elsewhere(module):
    names = {f"{name}." for name in outer_imports(MODULES[module])}
    for banned in FORBIDDEN.get(room_of(module), set()):
        assert not any(name.startswith(f"{banned}.") for name in names), f"{module}: {banned}"


def test_only_one_module_writes_event_files():
    writers = {
        module
        for module, path in MODULES.items()
        if any("tensorboard" in name.split(".") for name in outer_imports(path))
        or "SummaryWriter" in path.read_text()
    }
    assert writers == {"training.board"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name


def test_tests_stay_short():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path.name


def test_no_two_test_files_have_one_name():
    """pytest would take one for the other: their folders are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("module", [m for m, path in MODULES.items() if path.stem == "__init__"])
def test_no_name_hides_a_module(module):
    package = importlib.import_module(f"rl_ebm.{module}".rstrip("."))
    for path in MODULES[module].parent.iterdir():
        shown = getattr(package, path.stem, None)
        assert path.stem == "__init__" or shown is None or isinstance(shown, ModuleType), path


def test_importing_the_library_loads_no_heavy_extras():
    heavy = ["tensorboard", "torch.utils.tensorboard", "stable_baselines3", "transformers"]
    heavy += ["matplotlib", "tyro"]
    code = f"import sys, rl_ebm; print(*[m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


# The contracts ----------------------------------------------------------------------------------


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on a copy of the tree, which it reads and does not import."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as f; f()"]
    env = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(
        [*command, "--no-cache"], cwd=tree, env=env, capture_output=True, text=True
    )


@pytest.fixture
def tree(tmp_path):
    """What import-linter reads of the library, with its links."""
    for name in ("rl_ebm", "agents", "envs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


needs_links = pytest.mark.skipif(
    not (Path(rl_ebm.__file__).parent / "agents").is_dir(),
    reason="import-linter finds agents and envs by their links, which this copy lacks",
)


@needs_links
def test_the_contracts_are_kept():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "0 broken" in done.stdout


@needs_links
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("rl_ebm/tokens/space.py", "from rl_ebm.soft_bellman import backup", "imports point down"),
        ("rl_ebm/tokens/space.py", "import rl_ebm.ebm as e", "imports point down"),
        ("rl_ebm/bounds.py", "from . import divergences", "imports point down"),
        ("rl_ebm/rewards/table.py", "from ..policies import scoring", "imports point down"),
        (
            "rl_ebm/policies/tabular.py",
            "def f():\n    from rl_ebm.rewards import Table",
            "imports point down",
        ),
        ("agents/soft_q.py", "from rl_ebm.exact import solve", "imports point down"),
        ("envs/vector.py", "from rl_ebm.training import loop", "imports point down"),
        ("rl_ebm/ebm.py", "if TYPE_CHECKING:\n    from rl_ebm import EBM", "front door"),
        ("rl_ebm/ebm.py", "import rl_ebm", "front door"),
        ("agents/soft_q.py", "from rl_ebm.agents import path_consistency", "agents share"),
    ],
)
def test_the_contracts_find_imports_that_point_up_or_sideways(tree, file, line, contract):
    with open(tree / file, "a") as source:
        source.write(f"\n{line}\n")
    done = lint(tree)
    assert done.returncode == 1, done.stdout[-3000:]
    assert any(contract in line and "BROKEN" in line for line in done.stdout.splitlines())


@needs_links
def test_a_new_module_needs_a_place(tree):
    (tree / "rl_ebm/elsewhere.py").touch()
    assert lint(tree).returncode == 1


# Rooms and floors -------------------------------------------------------------------------------


def test_the_rooms_are_few_on_few_floors_without_a_circle():
    found = report(MODULES, list(SCRIPTS.rglob("*.py")))
    assert found.circles == []
    assert len(found.rooms) <= 26
    assert len(found.floors) <= 11
    assert found.closets == []
