"""Whether the outline of a checkpoint, a pickle, is one that ``torch.save`` writes: told unread.

A tuple of one tuple twice, that of another twice, and so on, is short in a file and takes for ever
to be hashed, which no signal ends. Keys are therefore text and whole numbers alone, and functions
get few arguments: what is left is read in a time of its own length.
"""

from __future__ import annotations

import pickletools
from typing import Any

# What torch.save writes of numbers, text, lists, dicts and tensors, and no more.
_OPCODES = {
    "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "NONE", "NEWTRUE",
    "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE",
    "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip
# How many values an instruction takes from the stack; these three take all above the last mark.
_TAKES = {
    "APPEND": 1, "BUILD": 1, "BINPERSID": 1, "STOP": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3,
    "SETITEM": 2, "REDUCE": 2,
}  # fmt: skip
_TAKE_ALL = {"TUPLE", "APPENDS", "SETITEMS"}
_MAX_ARGUMENTS = 8
_MAX_KEY = 2**60
"""whole numbers below are their own hashes: no file can choose those that all collide"""


def is_key(x: str | int) -> bool:
    """Whether text or a whole number can be a key of a checkpoint's dicts."""
    return isinstance(x, str) or abs(x) < _MAX_KEY


def check_outline(data: bytes) -> None:
    """Check an outline, by following the kind of each value that it would put onto the stack.

    Kinds are ``key``, ``()``, a tuple of few (``arguments``), a dict that is ``ordered``, the name
    of a global, and ``other``.

    Raises:
        ValueError: no checkpoint is written so.
    """
    stack: list[str] = []
    marks: list[int] = []
    memo: dict[Any, str] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name not in _OPCODES:
            raise ValueError(f"it holds {name}")
        if name in ("BINPUT", "LONG_BINPUT"):
            if int(argument or 0) > len(data):
                raise ValueError("it refers to what is not in it")
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name != "PROTO":
            place = marks.pop() if name in _TAKE_ALL else len(stack) - _TAKES.get(name, 0)
            taken = stack[place:]
            del stack[place:]
            stack += _made(name, argument, taken, stack)


def _made(name: str, argument: Any, taken: list[str], stack: list[str]) -> list[str]:
    """The kinds of what an instruction puts onto the stack; ValueError where none is written so."""
    if name in ("SETITEM", "SETITEMS") and set(taken[::2]) - {"key"}:
        raise ValueError("a key is neither text nor a whole number")
    if name == "BUILD" and stack[-1] != "ordered":  # a tensor would no longer be as it was checked
        raise ValueError("it changes what is no dict")
    if name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD", "STOP"):
        return []
    if name == "REDUCE":
        ordered = taken[0] == "collections OrderedDict"
        if taken[1] != ("()" if ordered else "arguments"):
            raise ValueError("it calls what it does not in a checkpoint")
        return ["ordered" if ordered else "other"]
    if name == "EMPTY_TUPLE":
        return ["()"]
    if name == "GLOBAL":
        return [str(argument)]
    if name.startswith("TUPLE"):
        return ["arguments" if len(taken) <= _MAX_ARGUMENTS else "other"]
    key = name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE")
    return ["key" if key and is_key(argument or 0) else "other"]
