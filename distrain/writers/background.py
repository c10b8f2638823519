"""What a writer is, the row that it writes, and the thread that writes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distrain.events.histogram import Histogram

logger = logging.getLogger(__name__)

MAX_WAITING_ROWS = 10_000
HANG_S = 60.0  # writers that write no row for so long, at the end, are waited for no longer


@dataclass(frozen=True)
class Row:
    """What one write period brings to the writers.

    Attributes:
        iteration: index of the last iteration in it: the number of finished iterations - 1.
        max_iter: number of iterations of the whole run.
        scalars: name -> (value, the iteration that it belongs to), the newest of each name.
        images: (name, (C, H, W) or (H, W) array of uint8 or of floats in [0, 1], iteration).
        histograms: (name, counts in bins, iteration).
        is_followed: another row comes at once, so a disk may wait for it.
    """

    iteration: int
    max_iter: int
    scalars: Mapping[str, tuple[float, int]]
    images: Sequence[tuple[str, NDArray[Any], int]] = field(default=())
    histograms: Sequence[tuple[str, Histogram, int]] = field(default=())
    is_followed: bool = False


class Writer(Protocol):
    """What writes rows somewhere; it lives on rank 0 only and may take its time.

    Training hands its rows to a `BackgroundWriter`, so `write` and `close` run in a thread of their
    own, one call at a time.
    """

    def write(self, row: Row) -> None:
        """Write one row."""

    def close(self) -> None:
        """Finish; called once, after the last row, also when training failed."""


class NewScalars:
    """Picks the scalars of a row that no earlier row held.

    A scalar put once in a thousand iterations is in every row, with its old iteration. Writers may
    share one: who asks for a row again gets the same answer.

    Args:
        start_iteration: the first iteration of this run; older values were written before it
            was interrupted.
    """

    def __init__(self, start_iteration: int = 0) -> None:
        self._oldest = start_iteration
        self._next: dict[str, int] = {}
        self._row: Row | None = None
        self._new: dict[str, tuple[float, int]] = {}

    def __call__(self, row: Row) -> Mapping[str, tuple[float, int]]:
        """Return name -> (value, iteration) of what is new, in the row's order."""
        if row is self._row:
            return self._new
        known, oldest = self._next, self._oldest
        new = {}
        for name, scalar in row.scalars.items():
            if scalar[1] >= known.get(name, oldest):
                new[name] = scalar
                known[name] = scalar[1] + 1
        self._row, self._new = row, new
        return new


class BackgroundWriter:
    """Hands rows to writers in a thread of its own: training pays for a queue, never for a disk.

    A writer that fails costs one warning, not the run; it gets the next row all the same, for a
    full disk may be emptied. What it has lost in the end is reported when it is closed. Should the
    writers hang, 10,000 rows wait, and later ones are lost.

    Args:
        writers: what gets each row, in this order.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)
        self._failing: set[int] = set()
        self._overfull = False
        self._rows: SimpleQueue[Row | Event | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="distrain-writers", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queue a row; its arrays and mappings must not change afterwards."""
        if self._rows.qsize() < MAX_WAITING_ROWS:
            self._rows.put(row)
        elif not self._overfull:
            self._overfull = True
            logger.warning("the writers hang: rows from iteration %d on are lost", row.iteration)

    def flush(self) -> None:
        """Wait until every queued row is written, unless the writers hang."""
        if not self._thread.is_alive():
            return
        written = Event()
        self._rows.put(written)
        waiting = self._rows.qsize() + 1
        while not written.is_set() and waiting > self._rows.qsize():
            waiting = self._rows.qsize()
            written.wait(HANG_S)

    def close(self) -> None:
        """Wait until every queued row is written and all writers are closed, unless they hang."""
        if not self._thread.is_alive():
            return
        self._rows.put(None)
        waiting = self._rows.qsize() + 1
        while self._thread.is_alive() and waiting > self._rows.qsize():
            waiting = self._rows.qsize()
            self._thread.join(HANG_S)
        if self._thread.is_alive():
            logger.warning("the writers hang: what they have not written in %g s is lost", HANG_S)

    def _run(self) -> None:
        while (row := self._rows.get()) is not None:
            if isinstance(row, Event):
                row.set()
                continue
            for number, writer in enumerate(self._writers):
                self._attempt(number, writer.write, row)
        for number, writer in enumerate(self._writers):
            self._attempt(number, writer.close, is_last=True)

    def _attempt(
        self, number: int, action: Callable[..., None], *args: Row, is_last: bool = False
    ) -> None:
        name = type(self._writers[number]).__name__
        try:
            action(*args)
        except Exception as error:
            if is_last or number not in self._failing:
                self._failing.add(number)
                after = "its end is missing" if is_last else "training goes on without"
                # an OSError says all in its text; the place of any other error is worth knowing
                trace = None if isinstance(error, OSError) else error
                logger.warning("%s: %s; %s", name, error, after, exc_info=trace)
        else:
            if number in self._failing:
                self._failing.discard(number)
                logger.info("%s works again", name)


def default_writers(
    run_dir: str | os.PathLike[str], *, start_iteration: int = 0, stream: TextIO | None = None
) -> list[Writer]:
    """Return the writers of an ordinary run: TensorBoard, JSON lines and console.

    Args:
        run_dir: gets tensorboard/ and metrics.jsonl.
        start_iteration: first iteration to be run; what an interrupted attempt wrote of it and of
            later ones is dropped.
        stream: of the console; the standard output by default.
    """
    # imported here: these cost 0.1 s, and only rank 0 has writers
    from distrain.writers.console import ConsoleWriter
    from distrain.writers.json_lines import JsonLinesWriter
    from distrain.writers.tensorboard import TensorBoardWriter

    new = NewScalars(start_iteration)
    return [
        TensorBoardWriter(Path(run_dir, "tensorboard"), purge_step=start_iteration, new=new),
        JsonLinesWriter(Path(run_dir, "metrics.jsonl"), start_iteration=start_iteration, new=new),
        ConsoleWriter(stream=stream, start_iteration=start_iteration, new=new),
    ]
