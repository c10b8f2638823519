"""metrics.jsonl: one JSON object per row, for pandas, jq and other programs."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from distrain.files.append_file import AppendFile
from distrain.files.atomic import replacing
from distrain.files.open_regular import open_regular
from distrain.run_layout import METRICS_FILE
from distrain.writers.base import Row, RunInfo, Writer

logger = logging.getLogger(__name__)


class JsonLinesWriter(Writer):
    """Appends `{"iteration": N, name: value, ...}` for each row that brings a new scalar.

    JSON has no NaN: values that are not finite are the strings "NaN", "Infinity" and "-Infinity"
    (as in protobuf's JSON), which Python's `float()` and JavaScript's `Number()` read. A torn last
    line is removed. While writes fail, the lines wait in memory.

    Args:
        path: the file, relative to the run folder.
    """

    def __init__(self, path: str | os.PathLike[str] = METRICS_FILE) -> None:
        self._path = Path(path)

    def open(self, run: RunInfo) -> None:
        path = run.run_dir / self._path
        self._file = AppendFile(path, prepare=lambda: _drop_lines(path, run.start_iteration))

    def write(self, row: Row) -> None:
        if row.new:
            values: dict[str, Any] = {name: value for name, (value, _) in row.new.items()}
            try:
                line = json.dumps({"iteration": row.iteration, **values}, allow_nan=False)
            except ValueError:
                values = {name: _strict(value) for name, value in values.items()}
                line = json.dumps({"iteration": row.iteration, **values})
            self._file.append(line.encode() + b"\n")
        if not row.more_follow:
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _strict(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_lines(path: Path, limit: int) -> None:
    """Remove the lines of iteration >= limit and incomplete ones; kill -9 safe."""
    if not path.exists():
        return
    with open(open_regular(path), "rb") as file:
        iterations = [_iteration(line) for line in file]
    keep = [iteration is not None and iteration < limit for iteration in iterations]
    if all(keep):
        return
    with replacing(path) as scratch, open(open_regular(path), "rb") as old:
        with open(scratch, "wb") as new:
            new.writelines(itertools.compress(old, keep))
    if damaged := iterations.count(None):
        logger.warning("%s: %d damaged lines removed", path, damaged)


def _iteration(line: bytes) -> int | None:
    """Return the iteration of a whole line; None for anything else."""
    try:
        row = json.loads(line)
    except ValueError:  # also UnicodeDecodeError, which zeroed pages may give
        return None
    if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("iteration"), int):
        return int(row["iteration"])
    return None
