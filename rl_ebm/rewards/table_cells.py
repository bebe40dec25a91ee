"""Cells of table files: what a header, an alphabet, a symbol and a score are."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


def read_columns(header: str, path: str) -> tuple[str, list[str]]:
    """Delimiter and names of the columns."""
    tried = []
    for delimiter in ",\t" if path.lower().endswith(".csv") else "\t,":
        columns = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter))]
        if columns.count("sequence") == 1 and columns.count("score") == 1:
            return delimiter, columns
        tried.append(columns)
    raise ValueError(
        f"the table file {path} must begin with a header that has one column 'sequence' and one "
        f"column 'score', separated by a tab or a comma, got {short(max(tried, key=len))}"
    )


@dataclass(frozen=True)
class Writing:
    """How the symbols of a sequence are written.

    Attributes:
        integers: whether they are integers, with white space between them.
        separator: what stands between two symbols when they are printed.
        verbatim: whether a cell is read as it stands, white space included.
    """

    integers: bool
    separator: str
    verbatim: bool

    @classmethod
    def of(cls, first: str, alphabet: str | None, separator: str | None) -> Writing:
        """From what was asked for, or from the first cell.

        Args:
            separator: None where the first cell tells integers from characters.
        """
        if separator is not None:
            return cls(False, separator, True)
        # Without white space split() finds one symbol: the cell is characters.
        integers = len(first.split()) > 1 or len((alphabet or "").split()) > 1
        return cls(integers, " " if integers else "", False)

    def split(self, cell: str) -> Sequence[str]:
        """The symbols of a cell."""
        if self.integers or self.separator == " ":
            return cell.split()
        if not self.verbatim:
            return cell.strip()
        return cell.split(self.separator) if self.separator and cell else cell

    def name(self, symbol: str) -> str:
        """The one name of a symbol.

        Raises:
            ValueError: it is none.
        """
        if not self.integers:
            if not symbol:
                raise ValueError(f"two {self.separator!r} with no symbol between them")
            if symbol.isspace() and not self.verbatim:
                raise ValueError("white space in a sequence of characters")
            return symbol
        # int() alone takes "1_0" too.
        if not re.fullmatch("[+-]?[0-9]{1,4000}", symbol):
            raise ValueError(f"the token {short(symbol)} is no integer")
        return str(int(symbol))

    def alphabet(self, text: str, least: int) -> tuple[str, ...]:
        """The symbols of an alphabet, at least so many.

        Raises:
            ValueError: fewer, one twice, or one that is none.
        """
        try:
            symbols = [self.name(symbol) for symbol in self.split(text)]
            if not self.verbatim and not self.integers and len(text.split()) > 1:
                raise ValueError("white space between characters")
        except ValueError:
            raise ValueError(
                f"alphabet must be integers separated by spaces where the sequences are, and "
                f"characters without spaces else, got {short(text)}"
            ) from None
        known = set()
        for symbol in symbols:
            if symbol in known:
                raise ValueError(f"alphabet has {symbol!r} twice: every symbol is one token")
            known.add(symbol)
        if len(symbols) < least:
            raise ValueError(f"alphabet must have at least {least} symbols, got {short(text)}")
        return tuple(symbols)


def read_scores(cells: list[str]) -> npt.NDArray[np.float64]:
    """(n,) scores; errors are about the first cell."""
    try:
        scores = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        raise ValueError(f"the score {short(cells[0])} is no number") from None
    # float() takes "1_5" too, more likely a slip than 15.
    # and other digits than ours.
    text = "".join(cells)
    if "_" in text or not text.isascii() or np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError(
            f"the score {short(cells[0])} is no number below +inf (-inf marks an impossible "
            "response)"
        )
    return scores


def minmax(scores: npt.NDArray[np.float64]) -> None:
    """Map the finite scores to [0, 1], in place."""
    finite = np.isfinite(scores)
    if not finite.any():
        raise ValueError("normalise needs finite scores, and all of them are -inf")
    low, high = float(scores[finite].min()), float(scores[finite].max())
    if not 0 < high - low < math.inf:
        raise ValueError(
            f"normalise needs finite scores that differ, and less than the largest float, got "
            f"{low} to {high}"
        )
    scores -= low
    scores /= high - low


def short(value: object) -> str:
    """How a value is written, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def size_text(count: int) -> str:
    return str(count) if count < 10**15 else f"about 10^{round(math.log10(count))}"
