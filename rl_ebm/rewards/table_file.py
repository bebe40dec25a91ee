"""Reward tables from TSV and CSV files: one row for each sequence, in any order.

The file has a header (line 1) with the columns ``sequence`` and ``score``; other columns are
not read. It is UTF-8 text. The delimiter is the comma or the tab under which the header has
both columns (the comma is tried first where the name ends in ``.csv``, else the tab); cells may
be quoted, blank lines are skipped.

A sequence is space-separated integers where the first cell, or the alphabet that is given, has
white space between symbols; else every character is a token. So ``12`` alone is two characters:
responses of a single integer token need an alphabet such as ``"0 1 12"``. A score is a number
or ``-inf`` (an impossible response).

A separator that is given stands between symbols of any length, and a cell is then read as it
stands: ``" "`` for words, ``""`` for characters of which white space is one. With a separator the
sequences may be of different lengths, and without one where that is asked for (``ragged``): the
table is then one of EOS mode, in which each response ends by a token of its own, the last one of
the vocabulary; an empty cell is the empty response.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index
from typing import Any, TextIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from torch import Tensor

from rl_ebm.messages.arguments import flag, has_end, shown
from rl_ebm.rewards.table_cells import (
    Writing,
    minmax,
    read_columns,
    read_scores,
    short,
    size_text,
)
from rl_ebm.tokens import TokenSpace

X = TypeVar("X")

_MAX_LINE = 1 << 20  # characters of the header, where a device has no end
_CHUNK = 1 << 16  # rows that are held as Python objects at a time
_ALWAYS_FITS = 1 << 24  # scores: 128 MiB
_MOST_MISSING = 16  # times as many sequences as rows, above that


@dataclass(frozen=True, eq=False)
class TableFile:
    """What a table file holds. ``separator`` stands between the symbols of a sequence."""

    scores: Float64[Tensor, "N"]
    """R of each sequence in enumeration order; ``-inf`` where it is impossible"""
    space: TokenSpace
    """of fixed length, or with the last token as EOS where the sequences have different ones"""
    alphabet: tuple[str, ...]
    """symbol of each token id; of an integer token its decimal digits, of EOS nothing"""
    separator: str = ""
    """a space where the tokens are integers"""

    def decode(self, tokens: Sequence[int]) -> str:
        """The sequence (or prefix) as the file writes it.

        Raises:
            TypeError: no list of integers.
            ValueError: a token id out of [0, A).
        """
        try:
            tokens = [index(token) for token in tokens]
        except TypeError:
            raise TypeError(f"tokens must be a list of token ids, got {shown(tokens)}") from None
        wrong = [token for token in tokens if not 0 <= token < len(self.alphabet)]
        if wrong:
            raise ValueError(f"token ids must be in [0, {len(self.alphabet)}), got {wrong[0]}")
        symbols = (self.alphabet[token] for token in tokens if token != self.space.eos_id)
        return self.separator.join(symbols)


def read_table(
    path: str | os.PathLike[str],
    alphabet: str | None = None,
    normalise: str | None = None,
    missing: str = "error",
    separator: str | None = None,
    ragged: bool | None = None,
) -> TableFile:
    """Read a table file; see the module's docstring for the format.

    Args:
        path: the file.
        alphabet: the symbols in the order of their token ids, ``"ACGT"`` or ``"0 1 12"``; None
            for those in the file, sorted (integers as numbers).
        normalise: ``"minmax"`` maps the finite scores to [0, 1]; None leaves them.
        missing: ``"error"``, or ``"forbid"`` to give a missing sequence the score ``-inf``.
        separator: what stands between two symbols, in the alphabet as well; None for integers with
            spaces between them, or characters.
        ragged: whether sequences may be of different lengths; None: where a separator is given.
            They make a table of EOS mode where they are (with True in any case).

    Raises:
        ValueError: a file that cannot be read or is not as described, with the line; a
            duplicate, missing or ragged sequence; a score that is no number below +inf; more
            sequences than are worth their memory; an argument of no known value.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a table file, got {shown(path)}")
    if not (normalise is None or (isinstance(normalise, str) and normalise == "minmax")):
        raise ValueError(f'normalise must be "minmax" or None, got {shown(normalise)}')
    if not (isinstance(missing, str) and missing in ("error", "forbid")):
        raise ValueError(f'missing must be "error" or "forbid", got {shown(missing)}')
    for name, text in (("alphabet", alphabet), ("separator", separator)):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name} must be text, got {shown(text)}")
    flag("ragged", ragged, unset=True)
    has_end(path)
    try:
        # newline="": the csv module does its own, inside quotes as well.
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _Rows(file, os.fspath(path), alphabet, separator, ragged)
    except OSError as error:
        raise ValueError(f"cannot read the table file {path}: {error.strerror}") from None
    except UnicodeEncodeError:
        raise ValueError(f"no file has the name {shown(os.fspath(path))}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the table file {path} is no text in UTF-8") from None
    try:
        scores, symbols = rows.fill(forbid=missing == "forbid")
        if normalise is not None:
            minmax(scores)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows.ends:
        space = TokenSpace(len(symbols), rows.length)
    else:
        space = TokenSpace(len(symbols) + 1, rows.length + 1, eos_id=len(symbols))
        symbols = (*symbols, "")
    return TableFile(torch.from_numpy(scores), space, symbols, rows.writing.separator)


class _Rows:
    """All rows of a file as arrays: ids of the tokens by first appearance, length, score, line.

    Attributes:
        ends: whether the sequences end by an EOS.
        length: tokens of the longest one.
    """

    def __init__(
        self,
        file: TextIO,
        path: str,
        alphabet: str | None,
        separator: str | None,
        ragged: bool | None,
    ) -> None:
        self.path = path
        self.ragged = separator is not None if ragged is None else ragged
        first = True
        codes, sizes, scores, lines = [], [], [], []
        for line, sequence_cells, score_cells in self._chunks(file):
            if first:
                self._begin(sequence_cells[0], alphabet, separator)
                first = False
            tokens, lengths = self._locate(self._codes, sequence_cells, line)
            codes.append(tokens)
            sizes.append(lengths)
            scores.append(self._locate(read_scores, score_cells, line))
            lines.append(np.array(line))
        if first:
            raise ValueError(f"the table file {path} has no rows below its header")
        self.codes, self.sizes = np.concatenate(codes), np.concatenate(sizes)
        self.scores, self.lines = np.concatenate(scores), np.concatenate(lines)
        self.length = int(self.sizes.max())
        self.ends = ragged is True or int(self.sizes.min()) < self.length
        if self.length == 0:
            raise ValueError(f"the table file {path} has the empty sequence alone")

    def _chunks(self, file: TextIO) -> Iterator[tuple[list[int], list[str], list[str]]]:
        """Line numbers, sequences and scores of many rows at a time."""
        begin = []  # to be read again; file.seek would refuse pipes
        while text := file.readline(_MAX_LINE):
            if len(text) == _MAX_LINE:
                raise ValueError(
                    f"the table file {self.path} begins with a line of {_MAX_LINE:,} characters "
                    "or more, which is no header"
                )
            begin.append(text)
            if text.strip():
                break
        else:
            raise ValueError(f"the table file {self.path} is empty")
        delimiter, columns = read_columns(begin[-1], self.path)
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

    def _begin(self, first: str, alphabet: str | None, separator: str | None) -> None:
        """Decide from the first sequence what a token is, and T."""
        self.writing = Writing.of(first, alphabet, separator)
        self.length = len(self.writing.split(first))
        least = 1 if self.ragged else 2
        self.alphabet = None if alphabet is None else self.writing.alphabet(alphabet, least)
        self.ids = _Ids(self.writing, self.alphabet)

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

    def _codes(self, cells: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Ids of all cells one after the other, and lengths; errors are about the first cell."""
        rows = list(map(self.writing.split, cells))
        wrong = any(len(row) != self.length for row in rows) or not self.length
        if wrong and not self.ragged:
            raise ValueError(
                f"the sequence {short(cells[0])} has {len(rows[0])} tokens, expected "
                + (f"the {self.length} of the first row" if self.length else "at least one")
            )
        tokens = map(self.ids.__getitem__, chain.from_iterable(rows))
        codes = np.fromiter(tokens, np.int32, sum(map(len, rows)))
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        # The ids of 16.7 million rows stay small: usually one byte each.
        codes = codes.astype(np.min_scalar_type(len(self.ids)))
        return codes, sizes.astype(np.min_scalar_type(int(sizes.max())))

    def fill(self, forbid: bool) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
        """Scores in enumeration order, and the symbols in the order of their token ids."""
        names, rows = list(self.ids.names), len(self.scores)
        symbols = self.alphabet
        if symbols is None:
            numbers = self.writing.integers or all(re.fullmatch("[0-9]{1,18}", n) for n in names)
            symbols = tuple(sorted(names, key=int) if numbers else sorted(names))
        if len(symbols) < 2 and not self.ends:
            raise ValueError(
                f"{short(symbols[0])} is the only symbol, and a token space needs 2: give the "
                "alphabet"
            )
        count = self._offset(len(symbols), self.length) + len(symbols) ** self.length
        if count > max(_ALWAYS_FITS, _MOST_MISSING * rows):
            raise ValueError(
                f"{len(symbols)} symbols and length {self.length} make {size_text(count)} "
                f"sequences ({size_text(8 * count)} bytes of scores), but the file has {rows} "
                "rows: that is no table"
            )
        place = {symbol: i for i, symbol in enumerate(symbols)}
        index = self._indices(np.array([place[name] for name in names]), len(symbols))
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

    def _offset(self, base: int, length: int) -> int:
        """How many sequences are shorter, in EOS mode; they come first."""
        return sum(base**t for t in range(length)) if self.ends else 0

    def _indices(self, rank: npt.NDArray[np.int64], base: int) -> npt.NDArray[np.int64]:
        """The place of every row in enumeration order."""
        index = np.zeros(len(self.scores), dtype=np.int64)
        starts = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        for length in np.unique(self.sizes).tolist():
            rows = np.flatnonzero(self.sizes == length)
            found = np.full(len(rows), 0, dtype=np.int64)
            for i in range(length):
                found = found * base + rank[self.codes[starts[rows] + i]]
            index[rows] = found + self._offset(base, length)
        return index

    def _write(self, index: int | np.int64, symbols: tuple[str, ...]) -> str:
        length = self.length
        while self.ends and index < self._offset(len(symbols), length):
            length -= 1
        index, digits = int(index) - self._offset(len(symbols), length), []
        for _ in range(length):
            index, digit = divmod(index, len(symbols))
            digits.append(symbols[digit])
        return short(self.writing.separator.join(reversed(digits)))


class _Ids(dict[str, int]):
    """Id of every symbol as it is written, numbered as they come, or by the alphabet given."""

    def __init__(self, writing: Writing, alphabet: tuple[str, ...] | None) -> None:
        super().__init__()
        self.writing, self.closed = writing, alphabet is not None
        # "1" and "01" are one integer: two keys here, one name.
        self.names = {symbol: i for i, symbol in enumerate(alphabet or ())}

    def __missing__(self, symbol: str) -> int:
        name = self.writing.name(symbol)
        if self.closed and name not in self.names:
            raise ValueError(f"the token {short(symbol)} is not in the alphabet")
        self[symbol] = self.names.setdefault(name, len(self.names))
        return self[symbol]
