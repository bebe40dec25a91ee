"""The rooms of the library: which imports which, on how many floors, and what stands wrongly.

A room is a package right under ``rl_ebm``, or a module there. A floor is the length of the longest
way down. A closet is a module of which one single module knows, and that one in another room; the
scripts in benchmarks/ are users as well. What a table of kinds alone knows is no closet.

    python -m benchmarks.support.rooms
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rl_ebm

SCRIPTS = Path(__file__).parents[1]
TABLES = ("training.kinds",)
"""modules that know every kind of something"""


def read_modules() -> dict[str, Path]:
    """Module names without ``rl_ebm.``, the package itself being ''; through the links."""
    root = Path(rl_ebm.__file__).parent
    # agents/ and envs/ are links in there, or stand beside it where links are not kept.
    roots = {root: (), **{Path(r.__file__).parent: (r.__name__.split(".")[-1],) for r in _BESIDE}}
    found = {}
    for at, above in roots.items():
        for path in (Path(folder) / name for folder, _, names in os.walk(at) for name in names):
            if path.suffix == ".py":
                parts = (*above, *path.relative_to(at).with_suffix("").parts)
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


_BESIDE = (rl_ebm.agents, rl_ebm.envs)


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that one imports anywhere; ``rl_ebm.a.f`` is ``a`` where f is no module."""
    here = ["rl_ebm", *module.split(".")] if module else ["rl_ebm"]
    package = here if path.stem == "__init__" else here[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        if name.split(".")[0] == "rl_ebm":
            parts = name.split(".")[1:]
            while ".".join(parts) not in modules:
                parts.pop()
            found.add(".".join(parts))
    return found - {module}


def room_of(module: str) -> str:
    return module.split(".")[0]


@dataclass(frozen=True)
class Rooms:
    """The picture: ``rooms`` with those below each, ``floors`` from the bottom up."""

    rooms: dict[str, set[str]]
    floors: list[list[str]]
    circles: list[str]
    closets: list[str]


def report(modules: dict[str, Path], scripts: Sequence[Path] = ()) -> Rooms:
    """Rooms, floors, circles and closets of modules; ``scripts`` use them from outside."""
    imports = {m: imports_of(m, path, modules) for m, path in modules.items()}
    outside = [imports_of("", path, modules) for path in scripts]
    rooms: dict[str, set[str]] = {room_of(m): set() for m in modules}
    for m, others in imports.items():
        rooms[room_of(m)] |= {room_of(o) for o in others} - {room_of(m)}
    floors, left = [], dict(rooms)
    while done := sorted(r for r, below in left.items() if not below & set(left)):
        floors.append(done)
        left = {r: below for r, below in left.items() if r not in done}
    closets = []
    for m in modules:
        users = [x for x, others in imports.items() if m in others]
        outer = sum(m in others for others in outside)
        alone = len(users) == 1 and not outer and users[0] not in TABLES
        if "." in m and alone and room_of(users[0]) != room_of(m):
            closets.append(f"{m} <- {users[0]}")
    return Rooms(rooms, floors, sorted(left), closets)


def text(found: Rooms) -> str:
    """The picture as text, the lowest floor last."""
    lines = [
        f"{i:2}  {'  '.join(room or 'rl_ebm' for room in floor)}"
        for i, floor in reversed(list(enumerate(found.floors)))
    ]
    arrows = sum(map(len, found.rooms.values()))
    lines.append(
        f"{len(found.rooms)} rooms on {len(found.floors)} floors, {arrows} arrows between them"
    )
    return "\n".join(lines)


def main() -> None:
    found = report(read_modules(), list(SCRIPTS.rglob("*.py")))
    print(text(found))
    print(f"in a circle: {', '.join(found.circles) or 'none'}")
    print(f"with one importer, in another room: {', '.join(found.closets) or 'none'}")


if __name__ == "__main__":
    main()
