"""Objective of a run: the best value of one scalar, for sweeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.files.open_regular import open_regular
from distrain.run_layout import METRICS_FILE

Mode = Literal["max", "min"]


def objective(
    run_dir: str | Path, metric: str, *, mode: Mode, max_iter: int | None = None
) -> float | None:
    """Return the best finite value of a scalar in metrics.jsonl; None if there is none.

    Args:
        run_dir: folder of the run.
        metric: name of the scalar, as "eval/accuracy".
        mode: whether the largest or the smallest value is the best.
        max_iter: take the first `max_iter` iterations only.

    Raises:
        ConfigError: the run has no scalar of that name in these iterations.
    """
    names: dict[str, None] = {}
    values = []
    is_known = False
    for row in _rows(Path(run_dir) / METRICS_FILE):
        if max_iter is not None and row["iteration"] >= max_iter:
            continue
        names |= dict.fromkeys(row)
        is_known |= metric in row
        value = row.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            values.append(float(value))
    if not is_known:
        names.pop("iteration", None)
        raise ConfigError(f"{metric}: no such scalar in {run_dir}; {did_you_mean(metric, names)}")
    return (max if mode == "max" else min)(values, default=None)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of metrics.jsonl."""
    try:
        with open(open_regular(path), "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                    yield row
    except FileNotFoundError:
        return
