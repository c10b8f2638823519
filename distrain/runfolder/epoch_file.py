"""Length of a run that is given in epochs, as its ranks have computed it from the data."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from distrain.durations import epochs, whole_iterations
from distrain.files import atomic
from distrain.files.open_regular import read_regular
from distrain.run_layout import EPOCHS_FILE

_MAX_BYTES = 1 << 10
_MAX_ITERS = 2**53


def write_epoch(run_dir: str | Path, iters_per_epoch: Fraction) -> None:
    """Write the length of an epoch, for commands that do not build the data."""
    text = json.dumps({"iters_per_epoch": str(iters_per_epoch)}) + "\n"
    atomic.write(Path(run_dir, EPOCHS_FILE), text.encode())


def num_iterations(run_dir: str | Path, max_iter: object) -> int | None:
    """Return a run's `trainer.max_iter` in iterations; None if it is in epochs of unknown length.

    Args:
        run_dir: its folder, of any author.
        max_iter: an int, or text in epochs.
    """
    if isinstance(max_iter, int):
        return max_iter
    if epochs(max_iter) is None:
        return None
    try:
        data = json.loads(read_regular(Path(run_dir, EPOCHS_FILE), max_bytes=_MAX_BYTES))
        length = Fraction(data["iters_per_epoch"])
        found = whole_iterations("trainer.max_iter", max_iter, iters_per_epoch=length)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None
    return found if 0 < found < _MAX_ITERS else None
