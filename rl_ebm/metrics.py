"""metrics.csv: one row for each time the run was logged, cut back when it is resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from rl_ebm.checkpoint import write_text


class MetricsFile:
    """Appends rows to a CSV file; a name that is new becomes a further column.

    Args:
        path: the file; made where it is missing.
        keep: rows of an existing file that stay; what follows them is cut off, a line that was
            cut short by a crash included.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows = 0
        rows: list[dict[str, str]] = []
        if keep and path.exists():
            with open(path, newline="") as file:
                reader = csv.DictReader(file)
                rows = [row for row, _ in zip(reader, range(keep), strict=False)]
                self.columns = list(reader.fieldnames or [])
        self._rewrite(rows)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append one row; columns that it does not have stay empty."""
        new = [name for name in row if name not in self.columns]
        if new:
            self.file.flush()
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self.file.close()
            self._rewrite(rows)
        csv.DictWriter(self.file, self.columns, restval="").writerow(row)
        self.rows += 1

    def flush(self) -> int:
        """Send what was written on its way to the disk; the number of rows."""
        self.file.flush()
        return self.rows

    def close(self) -> None:
        self.file.close()

    def _rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        if self.columns:
            writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.rows = len(rows)
        self.file = open(self.path, "a", newline="")  # noqa: SIM115 - closed by close()
