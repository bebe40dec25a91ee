"""Ten thousand wrong inputs, each of which must end in success or in one sentence.

A *kind* is a module with ``COUNT``, ``case(seed)``, a pure function that makes an input, and
``attempt(case, folder)``, which hands it to the library and says how that ended. Every seed in
``range(COUNT)`` is tried; ``python -m tests.fuzz KIND SEED`` shows one of them and all of what it
does, ``python -m tests.fuzz [KIND ...]`` tries all.
"""

from importlib import import_module
from types import ModuleType

KINDS = ("tables", "expressions", "references", "commands", "calls", "damage")


def module_of(kind: str) -> ModuleType:
    """The module of a kind; ``deliberate`` is the one that tests the instrument itself."""
    if kind not in (*KINDS, "deliberate"):
        raise SystemExit(f"there is no kind {kind!r}; there are: {', '.join(KINDS)}")
    return import_module(f"{__name__}.{kind}")
