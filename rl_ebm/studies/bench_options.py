"""Options of a benchmark's agents, from a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(x for x, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def read_options(path: Path | None) -> dict[str, dict[str, Any]]:
    """Options of agents from a JSON file.

    Raises:
        ValueError: it is no such file.
    """
    if path is None:
        return {}
    try:
        found: Any = json.loads(path.read_text(), object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError(f"{path} is no JSON of options (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"{path} must hold {{agent: {{option: value}}}}")
    return found
