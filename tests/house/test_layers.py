"""Imports point down: the layers of the library, read from its source.

``LAYERS`` is the whole rule. A module may import those of the rows above its own; within a row
only modules of one room (a package) may import each other. A new file goes into a row.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rl_ebm

ROOT = Path(rl_ebm.__file__).parent

# From the bottom up. A name ending in "." is a package: a room for all modules below it.
LAYERS = (
    (
        "messages.",
        "version",
    ),
    (
        "files.",
        "plugins",
        "statistics.",
        "tokens.",
    ),
    (
        "automata.",
        "networks.",
        "soft_bellman",
    ),
    (
        "bounds",
        "divergences",
        "policies.",
        "rewards.",
    ),
    (
        "ebm",
        "fixed_points.",
    ),
    (
        "agents.",
        "certificates.",
        "exact.",
        "tasks.",
    ),
    (
        "envs.",
        "verification.",
    ),
    ("training.",),
    ("studies.",),
    (
        "",
        "cli.",
    ),
    ("__main__",),
)

# Agents do not know each other; what they share is listed here.
SHARED_BY_AGENTS = ("agents.shared.", "agents.names", "agents.registry")

# What lives elsewhere: room, and the packages that it must leave alone.
FORBIDDEN = {
    "tokens": {"torch.nn", "torch.optim"},
    "tiles": {"torch.nn", "torch.optim"},
    "prefix_tree": {"torch.nn", "torch.optim"},
    "soft_bellman": {"torch.nn", "torch.optim", "logging"},
    "divergences": {"torch.nn", "torch.optim", "logging"},
    "automata.": {"torch.nn", "torch.optim", "logging"},
    "bounds": {"torch.nn", "torch.optim", "logging"},
    "mean_bounds": {"torch.nn", "torch.optim", "logging"},
    "agents.": {"time", "pathlib", "os", "io", "shutil", "logging"},
}

MAX_LINES = 400


def read_modules() -> dict[str, Path]:
    """Module names without ``rl_ebm.``, the package itself being ''."""
    # agents/ and envs/ are links in ROOT, or stand beside it where links are not kept.
    roots = [ROOT, *(Path(room.__file__).parent for room in (rl_ebm.agents, rl_ebm.envs))]
    found = {}
    for root in roots:
        above = () if root == ROOT else (root.name,)
        for path in (Path(at) / name for at, _, names in os.walk(root) for name in names):
            if path.suffix == ".py":
                parts = (*above, *path.relative_to(root).with_suffix("").parts)
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                found[".".join(parts)] = path
    return found


MODULES = read_modules()


def room_of(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to."""
    for name in (name for row in LAYERS for name in row):
        if module == name or (name.endswith(".") and f"{module}.".startswith(name)):
            return name
    return None


def layer_of(room: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if room in row)


def imports_of(module: str, source: str) -> set[str]:
    """Full names of everything imported anywhere: in functions and under TYPE_CHECKING too."""
    is_package = MODULES.get(module, Path("m.py")).name == "__init__.py"
    here = ["rl_ebm", *module.split(".")] if module else ["rl_ebm"]
    package = here if is_package else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def inner_imports(module: str, source: str) -> set[str]:
    """The modules of rl_ebm among them: ``rl_ebm.a.f`` is module ``a`` where f is no module."""
    found = set()
    for name in imports_of(module, source):
        if name.split(".")[0] == "rl_ebm":
            path = name.split(".")[1:]
            while ".".join(path) not in MODULES:
                path.pop()
            found.add(".".join(path))
    return found - {module}


def fault(module: str, other: str) -> str | None:
    """What is wrong with one import, in words; None where nothing is."""
    room, other_room = room_of(module), room_of(other)
    if layer_of(other_room) > layer_of(room):
        return f"{module} imports {other}, which stands above it"
    if layer_of(other_room) == layer_of(room) and other_room != room:
        return f"{module} imports {other}, which stands beside it"
    if room == "agents." and other_room == room and module != "agents":
        return (
            None
            if f"{other}.".startswith(SHARED_BY_AGENTS)
            else f"agent {module} imports agent {other}"
        )
    return None


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_place(module):
    assert room_of(module) is not None, f"add {module!r} to LAYERS in {Path(__file__).name}"


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) is not None])
def test_imports_point_down(module):
    others = inner_imports(module, MODULES[module].read_text())
    faults = [fault(module, other) for other in others if room_of(other) is not None]
    assert [f for f in faults if f] == []


@pytest.mark.parametrize("module", MODULES)
def test_each_room_leaves_alone_what_lives_elsewhere(module):
    names = {f"{name}." for name in imports_of(module, MODULES[module].read_text())}
    for banned in FORBIDDEN.get(room_of(module), set()):
        assert not any(name.startswith(f"{banned}.") for name in names), f"{module}: {banned}"


def test_only_one_module_writes_event_files():
    writers = {
        module
        for module, path in MODULES.items()
        if any(
            "tensorboard" in name.split(".") and name.split(".")[0] != "rl_ebm"
            for name in imports_of(module, path.read_text())
        )
        or "SummaryWriter" in path.read_text()
    }
    assert writers <= {"training.board"}


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES


def test_tests_stay_short():
    for path in Path(__file__).parents[1].rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path.name


def test_importing_the_library_loads_no_heavy_extras():
    heavy = ["tensorboard", "torch.utils.tensorboard", "stable_baselines3", "transformers"]
    heavy += ["matplotlib", "tyro"]
    code = f"import sys, rl_ebm; print(*[m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


# The rule itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "line", "word"),
    [
        ("tokens", "from rl_ebm.soft_bellman import backup", "above"),
        ("tokens", "import rl_ebm.ebm as e", "above"),
        ("bounds", "from rl_ebm import ebm", "above"),
        ("bounds", "from . import divergences", "beside"),
        ("rewards.table", "from rl_ebm.policies.tabular import Tabular", "beside"),
        ("rewards.table", "from ..policies import scoring", "beside"),
        ("policies.tabular", "def f():\n    from rl_ebm.rewards import Table", "beside"),
        ("ebm", "if TYPE_CHECKING:\n    from rl_ebm import EBM", "above"),
        ("ebm", "import rl_ebm", "above"),
    ],
)
def test_the_rule_finds_imports_that_point_up_or_sideways(module, line, word):
    (other,) = inner_imports(module, line)
    assert word in fault(module, other)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("bounds", "from rl_ebm.tokens import TokenSpace"),
        ("rewards.table", "from rl_ebm.rewards.base import Prompts"),
        ("rewards", "from .table import Table"),
        ("ebm", "from rl_ebm import rewards, policies"),
        ("", "from rl_ebm.ebm import EBM"),
        ("tokens", "import torch"),
    ],
)
def test_the_rule_lets_imports_that_point_down_pass(module, line):
    assert [f for other in inner_imports(module, line) if (f := fault(module, other))] == []


def test_agents_may_share_but_not_know_each_other():
    assert fault("agents.soft_q", "agents.path_consistency")
    assert fault("agents.soft_q", "agents.shared.learner") is None
    assert fault("agents", "agents.soft_q") is None
    assert fault("agents.soft_q", "exact.solve")
