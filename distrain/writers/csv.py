"""CsvWriter: metrics.csv, one line per row, for spreadsheets."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from distrain.files import atomic
from distrain.files.open_regular import open_regular
from distrain.writers.base import Row, RunInfo, Writer


class CsvWriter(Writer):
    """Writes the column `iteration` and one per scalar; a cell is empty without a new value.

    A scalar with a new name adds a column on the right; the file is then written again as a whole.
    A run that is resumed drops the lines that are trained again.

    Args:
        path: the file, relative to the run folder.
        names: the scalars to write, in this order; None: all.
    """

    def __init__(
        self, path: str | os.PathLike[str] = "metrics.csv", *, names: Sequence[str] | None = None
    ) -> None:
        self._path = Path(path)
        self._names = names

    def open(self, run: RunInfo) -> None:
        self._file_path = run.run_dir / self._path
        self._columns = ["iteration", *(self._names or ())]
        kept: list[list[str]] = []
        if self._file_path.exists():
            with open(open_regular(self._file_path), newline="") as file:
                head, *lines = [*csv.reader(file)] or [self._columns]
            self._columns = head
            kept = [line for line in lines if _is_before(line, run.start_iteration)]
        self._write_again(kept)

    def write(self, row: Row) -> None:
        new = {n: v for n, (v, _) in row.new.items() if self._names is None or n in self._names}
        if not new:
            return
        if missing := [name for name in new if name not in self._columns]:
            with open(self._file_path, newline="") as file:
                lines = [*csv.reader(file)][1:]
            self._columns += missing
            self._write_again(lines)
        cells = [row.iteration, *(new.get(name, "") for name in self._columns[1:])]
        with open(self._file_path, "a", newline="") as file:
            file.write(_text([cells]))

    def _write_again(self, lines: Iterable[Sequence[object]]) -> None:
        atomic.write(self._file_path, _text([self._columns, *lines]).encode(), sync=False)


def _text(lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _is_before(line: Sequence[str], iteration: int) -> bool:
    return bool(line) and line[0].isdecimal() and int(line[0]) < iteration
