"""Reward tables from TSV and CSV files: one row for each sequence, in any order.

The file has a header (line 1) with the columns ``sequence`` and ``score``; other columns are
not read. It is UTF-8 text. The delimiter is the comma or the tab under which the header has
both columns (the comma is tried first where the name ends in ``.csv``, else the tab); cells may
be quoted, blank lines are skipped.

A sequence is space-separated integers where the first cell, or the alphabet that is given, has
white space between symbols; else every character is a token. So ``12`` alone is two characters:
responses of a single integer token need an alphabet such as ``"0 1 12"``. A score is a number
or ``-inf`` (an impossible response).
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from torch import Tensor

from rl_ebm.tokens import TokenSpace

X = TypeVar("X")

_CHUNK = 1 << 16  # rows that are held as Python objects at a time
_ALWAYS_FITS = 1 << 24  # scores: 128 MiB
_MOST_MISSING = 16  # times as many sequences as rows, above that


@dataclass(frozen=True, eq=False)
class TableFile:
    """What a table file holds. ``separator`` stands between the symbols of a sequence."""

    scores: Float64[Tensor, "N"]
    """R of each sequence in enumeration order, N = A**T; ``-inf`` where it is impossible"""
    space: TokenSpace
    """of fixed length"""
    alphabet: tuple[str, ...]
    """symbol of each token id; of an integer token its decimal digits"""
    separator: str = ""
    """a space where the tokens are integers"""

    def decode(self, tokens: Sequence[int]) -> str:
        """The sequence (or prefix) as the file writes it.

        Raises:
            ValueError: a token id out of [0, A).
        """
        wrong = [token for token in tokens if not 0 <= token < len(self.alphabet)]
        if wrong:
            raise ValueError(f"token ids must be in [0, {len(self.alphabet)}), got {wrong[0]}")
        return self.separator.join(self.alphabet[token] for token in tokens)


def read_table(
    path: str | os.PathLike[str],
    alphabet: str | None = None,
    normalise: str | None = None,
    missing: str = "error",
) -> TableFile:
    """Read a table file; see the module's docstring for the format.

    Args:
        path: the file.
        alphabet: the symbols in the order of their token ids, ``"ACGT"`` or ``"0 1 12"``; None
            for those in the file, sorted (integers as numbers).
        normalise: ``"minmax"`` maps the finite scores to [0, 1]; None leaves them.
        missing: ``"error"``, or ``"forbid"`` to give a missing sequence the score ``-inf``.

    Raises:
        ValueError: a file that cannot be read or is not as described, with the line; a
            duplicate, missing or ragged sequence; a score that is no number below +inf; more
            sequences than are worth their memory; an argument of no known value.
    """
    if normalise not in (None, "minmax"):
        raise ValueError(f'normalise must be "minmax" or None, got {normalise!r}')
    if missing not in ("error", "forbid"):
        raise ValueError(f'missing must be "error" or "forbid", got {missing!r}')
    try:
        # newline="": the csv module does its own, inside quotes as well.
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _Rows(file, os.fspath(path), alphabet)
    except OSError as error:
        raise ValueError(f"cannot read the table file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the table file {path} is no text in UTF-8") from None
    try:
        scores, symbols = rows.fill(forbid=missing == "forbid")
        if normalise is not None:
            _minmax(scores)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    space = TokenSpace(len(symbols), rows.length)
    return TableFile(torch.from_numpy(scores), space, symbols, rows.separator)


class _Rows:
    """All rows of a file as arrays: ids of the tokens by first appearance, score, line."""

    def __init__(self, file: TextIO, path: str, alphabet: str | None) -> None:
        self.path = path
        first = True
        codes, scores, lines = [], [], []
        for line, sequence_cells, score_cells in self._chunks(file):
            if first:
                self._begin(sequence_cells[0], alphabet)
                first = False
            codes.append(self._locate(self._codes, sequence_cells, line))
            scores.append(self._locate(_scores, score_cells, line))
            lines.append(np.array(line))
        if first:
            raise ValueError(f"the table file {path} has no rows below its header")
        self.codes, self.scores = np.concatenate(codes), np.concatenate(scores)
        self.lines = np.concatenate(lines)

    def _chunks(self, file: TextIO) -> Iterator[tuple[list[int], list[str], list[str]]]:
        """Line numbers, sequences and scores of many rows at a time."""
        begin = []  # to be read again; file.seek would refuse pipes
        for text in file:
            begin.append(text)
            if text.strip():
                break
        else:
            raise ValueError(f"the table file {self.path} is empty")
        delimiter, columns = _columns(begin[-1], self.path)
        sequence, score = columns.index("sequence"), columns.index("score")
        reader = csv.reader(chain(begin, file), delimiter=delimiter, strict=True)
        lines: list[int] = []
        sequence_cells: list[str] = []
        score_cells: list[str] = []
        head = True
        try:
            for row in reader:
                if not any(row):
                    continue
                if len(row) != len(columns):
                    if not "".join(row).strip():
                        continue
                    raise ValueError(
                        f"{self.path}, line {reader.line_num}: {len(row)} cells, but the header "
                        f"has {len(columns)}"
                    )
                if head:
                    head = False
                    continue
                lines.append(reader.line_num)
                sequence_cells.append(row[sequence])
                score_cells.append(row[score])
                if len(lines) == _CHUNK:
                    yield lines, sequence_cells, score_cells
                    lines, sequence_cells, score_cells = [], [], []
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {reader.line_num}: {error}") from None
        if lines:
            yield lines, sequence_cells, score_cells

    def _begin(self, first: str, alphabet: str | None) -> None:
        """Decide from the first sequence what a token is, and T."""
        # Without white space split() finds one symbol: the cell is characters.
        self.integers = len(first.split()) > 1 or len((alphabet or "").split()) > 1
        self.separator = " " if self.integers else ""
        self.length = len(self._split(first))
        self.alphabet = None if alphabet is None else _alphabet(alphabet, self.integers)
        self.ids = _Ids(self.integers, self.alphabet)

    def _split(self, cell: str) -> Sequence[str]:
        return cell.split() if self.integers else cell.strip()

    def _locate(self, parse: Callable[[list[str]], X], cells: list[str], lines: list[int]) -> X:
        """Parse a column; what is wrong with it is said of the first wrong cell's line."""
        try:
            return parse(cells)
        except ValueError:
            for line, cell in zip(lines, cells, strict=True):
                try:
                    parse([cell])
                except ValueError as error:
                    raise ValueError(f"{self.path}, line {line}: {error}") from None
            raise

    def _codes(self, cells: list[str]) -> npt.NDArray[Any]:
        """(n, T) ids; errors are about the first cell."""
        rows = list(map(self._split, cells))
        if any(len(row) != self.length for row in rows) or not self.length:
            raise ValueError(
                f"the sequence {_short(cells[0])} has {len(rows[0])} tokens, expected "
                + (f"the {self.length} of the first row" if self.length else "at least one")
            )
        tokens = map(self.ids.__getitem__, chain.from_iterable(rows))
        codes = np.fromiter(tokens, np.int32, len(rows) * self.length)
        # The ids of 16.7 million rows stay small: usually one byte each.
        return codes.astype(np.min_scalar_type(len(self.ids))).reshape(-1, self.length)

    def fill(self, forbid: bool) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
        """Scores in enumeration order, and the symbols in the order of their token ids."""
        names, rows = list(self.ids.names), len(self.scores)
        symbols = self.alphabet
        if symbols is None:
            symbols = tuple(sorted(names, key=int) if self.integers else sorted(names))
        if len(symbols) < 2:
            raise ValueError(
                f"{_short(symbols[0])} is the only symbol, and a token space needs 2: give the "
                "alphabet"
            )
        count = len(symbols) ** self.length
        if count > max(_ALWAYS_FITS, _MOST_MISSING * rows):
            raise ValueError(
                f"{len(symbols)} symbols and length {self.length} make {_size(count)} sequences "
                f"({_size(8 * count)} bytes of scores), but the file has {rows} rows: that is no "
                "table"
            )
        place = {symbol: i for i, symbol in enumerate(symbols)}
        rank = np.array([place[name] for name in names])
        index = np.zeros(rows, dtype=np.int64)
        for column in self.codes.T:
            index = index * len(symbols) + rank[column]
        # Of equal indices the last write stays: backwards, that is the first row.
        row_of = np.full(count, -1, dtype=np.int64)
        row_of[index[::-1]] = np.arange(rows)[::-1]
        duplicate = row_of[index] != np.arange(rows)
        if duplicate.any():
            row = int(duplicate.argmax())
            raise ValueError(
                f"line {self.lines[row]}: the sequence {self._write(index[row], symbols)} stands "
                f"already in line {self.lines[row_of[index[row]]]}"
            )
        if rows < count and not forbid:
            raise ValueError(
                f"{count - rows} of {count} sequences are missing, the first of them "
                f"{self._write((row_of < 0).argmax(), symbols)}: give each a score, or "
                'missing="forbid" (--missing forbid) to make them impossible'
            )
        scores = np.full(count, -np.inf)
        scores[index] = self.scores
        return scores, symbols

    def _write(self, index: np.int64, symbols: tuple[str, ...]) -> str:
        digits = []
        for _ in range(self.length):
            index, digit = divmod(index, len(symbols))
            digits.append(symbols[digit])
        return _short(self.separator.join(reversed(digits)))


class _Ids(dict[str, int]):
    """Id of every symbol as it is written, numbered as they come, or by the alphabet given."""

    def __init__(self, integers: bool, alphabet: tuple[str, ...] | None) -> None:
        super().__init__()
        self.integers, self.closed = integers, alphabet is not None
        # "1" and "01" are one integer: two keys here, one name.
        self.names = {symbol: i for i, symbol in enumerate(alphabet or ())}

    def __missing__(self, symbol: str) -> int:
        name = _name(symbol, self.integers)
        if self.closed and name not in self.names:
            raise ValueError(f"the token {_short(symbol)} is not in the alphabet")
        self[symbol] = self.names.setdefault(name, len(self.names))
        return self[symbol]


def _columns(header: str, path: str) -> tuple[str, list[str]]:
    """Delimiter and names of the columns."""
    tried = []
    for delimiter in ",\t" if path.lower().endswith(".csv") else "\t,":
        columns = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter))]
        if columns.count("sequence") == 1 and columns.count("score") == 1:
            return delimiter, columns
        tried.append(columns)
    raise ValueError(
        f"the table file {path} must begin with a header that has one column 'sequence' and one "
        f"column 'score', separated by a tab or a comma, got {_short(max(tried, key=len))}"
    )


def _alphabet(alphabet: str, integers: bool) -> tuple[str, ...]:
    try:
        symbols = [_name(symbol, integers) for symbol in alphabet.split()]
    except ValueError:
        raise ValueError(
            f"alphabet must be integers separated by spaces where the sequences are, and "
            f"characters without spaces else, got {_short(alphabet)}"
        ) from None
    if not integers:
        symbols = list(alphabet.strip())
    repeated = [symbol for i, symbol in enumerate(symbols) if symbol in symbols[:i]]
    if repeated:
        raise ValueError(f"alphabet has {repeated[0]!r} twice: every symbol is one token")
    if len(symbols) < 2:
        raise ValueError(f"alphabet must have at least 2 symbols, got {alphabet!r}")
    return tuple(symbols)


def _name(symbol: str, integers: bool) -> str:
    if not integers:
        if symbol.isspace():
            raise ValueError("white space in a sequence of characters")
        return symbol
    # int() alone takes "1_0" too.
    if not re.fullmatch("[+-]?[0-9]+", symbol):
        raise ValueError(f"the token {_short(symbol)} is no integer")
    return str(int(symbol))


def _scores(cells: list[str]) -> npt.NDArray[np.float64]:
    """(n,) scores; errors are about the first cell."""
    try:
        scores = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        raise ValueError(f"the score {_short(cells[0])} is no number") from None
    # float() takes "1_5" too, more likely a slip than 15.
    if "_" in "".join(cells) or np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError(
            f"the score {_short(cells[0])} is no number below +inf (-inf marks an impossible "
            "response)"
        )
    return scores


def _minmax(scores: npt.NDArray[np.float64]) -> None:
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


def _short(value: object) -> str:
    """How a value is written, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _size(count: int) -> str:
    return str(count) if count < 10**15 else f"about 10^{round(math.log10(count))}"
