"""Flags into dataclasses, by tyro; every wrong flag is one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Any, TypeVar, get_type_hints

import tyro

from rl_ebm.names import nearest

T = TypeVar("T")


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
            raise FlagError(f"{prog} has no flag {name}{nearest(name, sorted(known))}")
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                kind, args=list(args), prog=prog, description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise FlagError(_sentence(complaint.getvalue(), prog)) from None


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
    """The value that follows a flag, before the rest can be parsed; None where it is absent."""
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return None


def fail(message: str) -> int:
    """Print one sentence on standard error; the exit code of wrong input."""
    print("rl-ebm: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _sentence(box: str, prog: str) -> str:
    """The first paragraph of what tyro prints in a box."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    text: list[str] = []
    for line in lines[1:]:
        if set(line) <= {"─"}:
            break
        text.append(line)
    return (" ".join(text) or "wrong flags").rstrip(".") + f"; {prog} --help explains every flag"
