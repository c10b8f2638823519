"""A writer: one line of scalars.csv per row, for spreadsheets.

`+hooks.writer.writers.csv._target_=examples.csv_writer.CsvWriter` on the command line adds it to a
run, where TensorBoard, metrics.jsonl and the console stay as they are.
"""

import csv
from pathlib import Path

from distrain.writers import Row, RunInfo, Writer


class CsvWriter(Writer):
    """Writes the columns iteration and `names`; a cell is empty where there is no new value.

    Args:
        names: of scalars.
        path: the file, relative to the run folder.
    """

    def __init__(self, names: list[str] | None = None, path: str = "scalars.csv") -> None:
        self._names = names or ["loss", "lr"]
        self._path = path

    def open(self, run: RunInfo) -> None:
        """Open the file; keep the lines of earlier attempts that are not trained again."""
        path = Path(run.run_dir, self._path)
        kept = []
        if path.exists():
            with path.open(newline="") as file:
                lines = list(csv.reader(file))[1:]
            kept = [line for line in lines if int(line[0]) < run.start_iteration]
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerows([["iteration", *self._names], *kept])

    def write(self, row: Row) -> None:
        """Write a line if a value is new; flush it unless another row is queued."""
        if not row.new.keys().isdisjoint(self._names):
            values = (row.new[name][0] if name in row.new else "" for name in self._names)
            self._csv.writerow([row.iteration, *values])
        if not row.more_follow:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
