"""Installed packages of others: a module and its metadata in a folder, as pip leaves them."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, name: str, module: str, points: dict[str, dict[str, str]]) -> Path:
    """Lay out a distribution of one module, version 1.2, in a folder for ``sys.path``.

    Args:
        name: of the distribution, and of its module.
        module: the module's source.
        points: {group: {name: what it refers to}}.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(module)
    about = folder / f"{name}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = []
    for group, referred in points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in referred.items()), ""]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder
