"""metrics.jsonl: every row as one line of JSON, for pandas, jq and whatever comes."""

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
from distrain.files.regular import open_regular
from distrain.writers.base import NewScalars, Row

logger = logging.getLogger(__name__)


class JsonLinesWriter:
    """Appends `{"iteration": N, name: value, ...}` for each row that brings a new scalar.

    A value is the newest one at iteration N that no earlier line holds. JSON knows no NaN: values
    that are not finite are the strings "NaN", "Infinity" and "-Infinity" (as in protobuf's JSON),
    which `float()` of Python and `Number()` of JavaScript read.

    Args:
        path: the file; continued if it is there. A torn last line is removed.
        start_iteration: first iteration to be run; lines of it and of later ones, which an
            interrupted attempt wrote, are dropped, so that each iteration is there once, in order.
        new: tells what is new in a row, if other writers ask it too.

    A disk that refuses costs nothing but time: the lines wait until it takes them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start_iteration: int | None = None,
        new: NewScalars | None = None,
    ) -> None:
        path = Path(path)
        limit = math.inf if start_iteration is None else start_iteration
        self._new = new or NewScalars(start_iteration or 0)
        self._file = AppendFile(path, prepare=lambda: _drop_lines(path, limit))

    def write(self, row: Row) -> None:
        """Append a line; with the last of some rows in one system call; OSError if it fails."""
        new = self._new(row)
        if new:
            values: dict[str, Any] = {name: value for name, (value, _) in new.items()}
            try:
                line = json.dumps({"iteration": row.iteration, **values}, allow_nan=False)
            except ValueError:
                values = {name: _strict(value) for name, value in values.items()}
                line = json.dumps({"iteration": row.iteration, **values})
            self._file.append(line.encode() + b"\n")
        if not row.is_followed:
            self._file.flush()

    def close(self) -> None:
        """Write what waits and wait for the disk."""
        self._file.close()


def _strict(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _drop_lines(path: Path, limit: float) -> None:
    """Drop the lines of iteration >= limit and those that are not whole; kill -9 safe."""
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
