"""ConsoleWriter: a live progress bar in a terminal, elsewhere one plain line per row."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, TextIO

from distrain.progress import REFRESH_S, display, import_rich, is_terminal
from distrain.scalar_names import ETA_S, GUARD, LR, NONDETERMINISTIC_PREFIXES, STEP_S
from distrain.writers.base import Row, RunInfo, Writer

if TYPE_CHECKING:
    from rich.progress import TaskID

MAX_VALUES = 12
LINE_S = 0.25  # minimum time between plain lines
_HIDDEN = 3  # the place of scalars that are not listed


class ConsoleWriter(Writer):
    """Shows losses, metrics, learning rate, time per step and time left.

    In a terminal that is one live line: finished iterations, percentage, bar, elapsed time, time
    left and values, of which a narrow terminal shows the first; elsewhere
    (a file, a pipe, TERM=dumb or NO_COLOR set) one line per row::

        iter 199/2000  loss 0.0312  accuracy 0.98  lr 0.00100  0.0042 s/it  eta 0:00:07

    There "iter" is the index of the last finished iteration, the step that TensorBoard and
    metrics.jsonl show too; "epoch 1.50/3" follows in a run whose length is given in epochs. At most
    12 values are listed, losses first. Values of an earlier line are not repeated. At most
    four lines per second are printed, and in addition the last row and each one with a name that
    was not in the row before, such as an evaluation's.

    Args:
        stream: where to write; the standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._bar: TaskID | None = None
        self._shown: dict[str, float] = {}  # values of the bar, the newest of each name
        self._next_refresh_s = 0.0
        self._next_line_s = 0.0
        self._usual: frozenset[str] = frozenset()  # names in the row before
        self._skipped: tuple[Row, Mapping[str, float]] | None = None

    def open(self, run: RunInfo) -> None:
        self._iters_per_epoch = run.iters_per_epoch
        self._begin_s = time.monotonic()
        self._live = is_terminal(self._stream) and not os.environ.get("NO_COLOR")
        if self._live:
            import_rich()  # not in the thread that writes

    def write(self, row: Row) -> None:
        if not self._live:
            self._write_plain(row)
            return
        if self._bar is None:
            self._bar = display.add(self._stream, total=row.max_iter, text="")
        now_s = time.monotonic()
        # a row of an evaluation within a window has no loss: the bar goes on with that before it
        self._shown |= {name: value for name, (value, _) in row.scalars.items()}
        values = dict(self._shown)
        times = f"{timedelta(seconds=int(now_s - self._begin_s))} {_eta(values.pop(ETA_S, None))}"
        done = row.iteration + 1
        text = self._epoch(row) + describe(values)
        display.update(self._bar, completed=done, total=row.max_iter, times=times, text=text)
        if now_s >= self._next_refresh_s:  # drawing costs milliseconds
            self._next_refresh_s = now_s + REFRESH_S
            display.refresh()

    def _write_plain(self, row: Row) -> None:
        new = {name: value for name, (value, _) in row.new.items()}
        if not new:
            return
        if self._skipped is not None and self._skipped[0].iteration == row.iteration:
            new = {**self._skipped[1], **new}  # the final evaluation adds to the last row
        rare = new.keys() - self._usual
        self._usual = frozenset(new)
        now_s = time.monotonic()
        if now_s < self._next_line_s and all(_place(name) == _HIDDEN for name in rare):
            self._skipped = row, new
            return
        self._next_line_s = now_s + LINE_S
        self._print(row, new)

    def _print(self, row: Row, values: Mapping[str, float]) -> None:
        place = f"iter {row.iteration}/{row.max_iter}  {self._epoch(row)}"
        text = f"{place}{describe(values)}".rstrip()
        display.print(self._stream, text)
        self._skipped = None

    def _epoch(self, row: Row) -> str:
        """Return the epochs done, as "epoch 1.50/3  "; "" where a run counts iterations."""
        if self._iters_per_epoch is None:
            return ""
        done, total = ((n / self._iters_per_epoch) for n in (row.iteration + 1, row.max_iter))
        return f"epoch {done:.2f}/{total:.4g}  "

    def close(self) -> None:
        if self._skipped is not None:
            self._print(*self._skipped)
        if self._bar is not None:
            display.remove(self._bar, keep=True)
            self._bar = None


def describe(values: Mapping[str, float]) -> str:
    """Return a line of values: losses (a total first), metrics, lr, time per step, time left.

    Names with "loss" in them are losses; those under `lr/`, `guard/` and NONDETERMINISTIC_PREFIXES
    are left out.

    Example:
        `{"accuracy": 0.98, "loss": 0.03123, "lr": 1e-3, "perf/step_s": 0.0042, "perf/eta_s": 7.4}`
        gives "loss 0.03123  accuracy 0.98  lr 0.00100  0.0042 s/it  eta 0:00:07".
    """
    places: list[list[str]] = [[] for _ in range(_HIDDEN + 1)]
    for name in values:
        places[_place(name)].append(name)
    names = [name for place in places[:_HIDDEN] for name in place]
    parts = [f"{name} {values[name]:.4g}" for name in names[:MAX_VALUES]]
    if "lr" in values:
        parts.append(f"lr {values['lr']:#.3g}")
    if STEP_S in values:
        parts.append(f"{values[STEP_S]:.3g} s/it")
    if eta := _eta(values.get(ETA_S)):
        parts.append(eta)
    return "  ".join(parts)


def _eta(eta_s: float | None) -> str:
    if eta_s is None or not 0 <= eta_s < timedelta.max.total_seconds():
        return ""
    return f"eta {timedelta(seconds=int(eta_s))}"


@lru_cache(10_000)
def _place(name: str) -> int:
    """Return the place of a scalar in a line: 0 totals, 1 other losses, 2 metrics, or _HIDDEN."""
    if name == LR or name.startswith((f"{LR}/", GUARD, *NONDETERMINISTIC_PREFIXES)):
        return _HIDDEN
    if "loss" not in name.lower():
        return 2
    return 0 if "total" in name.lower() else 1
