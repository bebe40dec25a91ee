"""metrics.csv: one row for each time the run was logged, cut back when it is resumed."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO, TextIOWrapper
from pathlib import Path

from rl_ebm.files import RunError, check_size, gone, open_existing, write_text

_ROOM = 6
"""bytes of memory that the rows of numbers take for one of their file"""
_MAX_LINE = 2**22
"""characters; a thousand columns take twenty thousand"""


def read_rows(path: Path, most: int | None = None) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file, those at the front where only some are wanted.

    Raises:
        RunError: it is no table, no regular file, or larger than memory.
        FileNotFoundError: it is not there.
    """
    rows: list[dict[str, str]] = []
    try:
        with TextIOWrapper(open_existing(path), encoding="utf-8", newline="") as file:
            check_size(path, _ROOM * os.fstat(file.fileno()).st_size)
            reader = csv.DictReader(_lines(path, file), strict=True)
            columns = list(reader.fieldnames or [])
            for row in reader if most != 0 else ():
                if None in row or None in row.values():
                    raise RunError(f"{path} is damaged: line {reader.line_num} is no row of it")
                rows.append(row)
                if len(rows) == most:
                    break
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error})") from None
    if len(set(columns)) < len(columns):
        raise RunError(f"{path} is damaged: a column is there twice")
    return columns, rows


def read_kept(path: Path, keep: int) -> tuple[list[str], list[dict[str, str]]]:
    """Columns, and the rows that a checkpoint says there were; none of a file that is not there.

    Raises:
        RunError: there are fewer, or as :func:`read_rows`.
    """
    if not keep or not path.exists():
        return [], []
    columns, rows = read_rows(path, keep)
    if len(rows) < keep:
        raise RunError(
            f"{path} has {len(rows):,} of the {keep:,} rows that it had at the run's checkpoint: "
            "put the whole file back, or delete it to go on with a new one"
        )
    return columns, rows


def _lines(path: Path, file: TextIOWrapper) -> Iterator[str]:
    """The lines of a file; one without an end, of a hole say, is not read to where it ends."""
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE:
            raise RunError(f"{path} is damaged: line {number} has {_MAX_LINE:,} characters or more")
        yield line


class MetricsFile:
    """Appends rows to a CSV file; a name that is new becomes a further column.

    Args:
        path: the file; made where it is missing.
        keep: rows of an existing file that stay; what follows them is cut off, a line that was
            cut short by a crash included.

    Raises:
        RunError: the file is damaged, has fewer rows, or is no regular one.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self.rows = 0
        self.columns, rows = read_kept(path, keep)
        self._rewrite(rows)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append one row; columns that it does not have stay empty."""
        new = [name for name in row if name not in self.columns]
        if new:
            self.close()
            try:
                rows = read_rows(self.path)[1]
            except FileNotFoundError:
                raise gone(self.path.parent) from None
            self.columns += new
            self._rewrite(rows)
        csv.DictWriter(self.file, self.columns, restval="").writerow(row)
        self.rows += 1

    def flush(self) -> int:
        """Write to the disk what was written; the number of rows."""
        try:
            self.file.flush()
            # A checkpoint that outlives a power cut must not say more rows than the file then has.
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return self.rows

    def close(self) -> None:
        """Flush and close."""
        try:
            self.file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        if self.columns:
            writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.rows = len(rows)
        opened = open_existing(self.path, "ab", alone=True)
        self.file = TextIOWrapper(opened, encoding="utf-8", newline="")
