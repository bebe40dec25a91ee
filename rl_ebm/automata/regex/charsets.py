"""Sets of characters as patterns write them, and the kinds that no set tells apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_ebm.automata.regex.ids import FIRST, MOST

Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
CharacterSet = tuple[Any, Any]
"""an operation of the parser's tree and its value: LITERAL, NOT_LITERAL, ANY, IN, CATEGORY"""

UNICODE = 0x110000
WORD: CharacterSet = ("CATEGORY", "CATEGORY_WORD")
LINE_FEED: CharacterSet = ("LITERAL", 10)
_CATEGORIES = {"DIGIT": r"\d+", "SPACE": r"\s+", "WORD": r"\w+"}
_IN_ID_IS = {"DIGIT": True, "SPACE": False, "WORD": True}


def member(item: CharacterSet, codes: Codes, ids: bool) -> Mask:
    """Which code points a set has.

    Args:
        ids: whether code points of :mod:`regex_ids` are token ids, and so digits.
    """
    op, value = str(item[0]), item[1]
    found: Mask
    if op in ("ANY", "NOT_LITERAL"):
        found = codes != (10 if op == "ANY" else value)
    elif op == "LITERAL":
        found = codes == value
    elif op == "RANGE":
        found = (codes >= value[0]) & (codes <= value[1])
    elif op == "CATEGORY":
        name = str(value).removeprefix("CATEGORY_")
        found = _category(name.removeprefix("NOT_"), codes, ids) != name.startswith("NOT_")
    else:
        negated = str(value[0][0]) == "NEGATE"
        found = np.zeros(len(codes), dtype=np.bool_)
        for part in value[negated:]:
            found |= member(part, codes, ids)
        found = found != negated
    return found


def _category(name: str, codes: Codes, ids: bool) -> Mask:
    found = _table(name)[codes]
    if ids:
        found = found.copy()
        found[(codes >= FIRST) & (codes < FIRST + MOST)] = _IN_ID_IS[name]
    return found


@lru_cache(maxsize=3)
def _table(name: str) -> Mask:
    """Membership of every code point."""
    table = np.zeros(UNICODE, dtype=np.bool_)
    for match in re.finditer(_CATEGORIES[name], "".join(map(chr, range(UNICODE)))):
        table[match.start() : match.end()] = True
    return table


class Kinds:
    """Characters by kind: two are of one kind where no set tells them apart.

    Attributes:
        codes: the characters, sorted.
        of: the kind of each.
        count: how many kinds there are; kind ``count - 1`` is that of no character at all.
    """

    def __init__(self, codes: Codes, sets: Iterable[CharacterSet], ids: bool) -> None:
        self.codes, self.ids = codes, ids
        of = np.zeros(len(codes), dtype=np.int64)
        literals = set()
        for item in sets:
            if str(item[0]) in ("LITERAL", "NOT_LITERAL"):
                literals.add(item[1])
                continue
            of = _relabelled(2 * of + member(item, codes, ids))
        named = np.array(sorted(literals), dtype=np.int64)
        there = np.searchsorted(codes, named[np.isin(named, codes)])
        # Each literal is of a kind of its own.
        of[there] = np.arange(len(there)) + (int(of.max()) + 1 if len(of) else 0)
        self.of = _relabelled(of)
        self.count = int(self.of.max()) + 2 if len(of) else 1
        _, first = np.unique(self.of, return_index=True)
        self.samples: Codes = codes[first]

    def inside(self, item: CharacterSet) -> list[int]:
        """The kinds of a set's characters."""
        found: list[int] = member(item, self.samples, self.ids).nonzero()[0].tolist()
        return found

    def of_text(self, text: str) -> list[int]:
        """The kind of each character of a text."""
        codes = np.array([ord(c) for c in text], dtype=np.int64)
        place = np.searchsorted(self.codes, codes)
        found: list[int] = self.of[place].tolist()
        return found


def _relabelled(labels: Codes) -> Codes:
    """The same classes as 0, 1, 2, ..."""
    used = np.zeros(int(labels.max()) + 1 if len(labels) else 1, dtype=np.int64)
    used[labels] = 1
    return (np.cumsum(used) - 1)[labels]
