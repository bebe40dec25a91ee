"""Flags into dataclasses, by tyro; every wrong flag is one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Any, TypeVar, get_type_hints

import tyro

from rl_ebm.messages.words import nearest, printable

T = TypeVar("T")

_STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


_UNION = re.compile(r"no type matching (\S+) could be instantiated from \[(.*)\]$")
_KINDS = {"{None}": "None", "INT": "a whole number", "FLOAT": "a number", "STR": "text"}
LONGEST = 600
"""characters that are kept of what tyro says, and of a word"""


class FlagError(ValueError):
    """A flag that is unknown, or whose value is no value."""


def parse(kind: type[T], args: Sequence[str], prog: str, description: str) -> T:
    """The flags of a command.

    Raises:
        FlagError: a wrong flag, in one sentence.
        SystemExit: help was asked for, and printed.
    """
    known = flag_names(kind)
    for arg in args:
        name = arg.split("=")[0].replace("_", "-")
        if re.match(r"--[a-zA-Z]", arg) and name not in known | {"--help"}:
            shown_name = name if len(name) <= 60 else f"{name[:56]} ..."
            raise FlagError(f"{prog} has no flag {shown_name}{nearest(name, sorted(known))}")
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                kind, args=list(args), prog=prog, description=description, config=_STYLE
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise FlagError(_sentence(complaint.getvalue(), prog)) from None


def help_text(kind: Any, prog: str) -> str:
    """What ``--help`` prints."""
    text = StringIO()
    with suppress(SystemExit), redirect_stdout(text):
        tyro.cli(kind, args=["--help"], prog=prog, config=_STYLE)
    return text.getvalue()


def flag_names(kind: Any) -> set[str]:
    """All flags of a dataclass, those of dataclasses inside it included."""
    names: set[str] = set()
    hints = get_type_hints(kind)
    for f in fields(kind):
        if is_dataclass(hints[f.name]):
            names |= flag_names(hints[f.name])
        else:
            names.add("--" + f.name.replace("_", "-"))
    return names


def given(args: Iterable[str]) -> set[str]:
    """Names of the flags that stand on a command line."""
    return {a.split("=")[0].replace("_", "-") for a in args if a.startswith("--")}


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of a flag (its last one), before the rest can be parsed; None without it."""
    value = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(flag + "="):
            value = arg.split("=", 1)[1]
    return value


def fail(message: str) -> int:
    """Print one sentence on standard error; the exit code of wrong input.

    Words of more than :data:`LONGEST` characters, no path and no name, lose their middle.
    """
    line = " ".join(part.strip() for part in message.split("\n"))  # the spaces of a path stay
    words = [w if len(w) <= LONGEST else f"{w[:56]} ... {w[-40:]}" for w in line.split(" ")]
    print("rl-ebm: " + printable(" ".join(words)), file=sys.stderr)
    return 2


def _takes(found: re.Match[str]) -> str:
    """What a flag of several types takes, in words for tyro's."""
    kinds = [_KINDS.get(kind, kind) for kind in found[1].split("|")]
    return f"it takes {' or '.join(sorted(kinds, key='None'.__eq__))}, got {found[2]}"


def _sentence(box: str, prog: str) -> str:
    """The first paragraph of what tyro prints in a box."""
    # Without a terminal that has them, tyro draws its lines with ASCII characters.
    text: list[str] = []
    for line in box.splitlines()[1:]:
        words = line.strip("│╭╮╰╯|+ ")
        if set(words) <= {"─", "-"}:
            if text:
                break
            continue
        text.append(words)
    said = _UNION.sub(_takes, (" ".join(text) or "wrong flags").rstrip("."))
    if len(said) > LONGEST:  # it quotes a value in full
        said = f"{said[: LONGEST - 100]} ... {said[-60:]}"
    return f"{said}; {prog} --help explains every flag"
