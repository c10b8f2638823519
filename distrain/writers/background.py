"""The thread that hands rows to the writers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Event, Thread

from distrain.writers.base import Row, Writer

logger = logging.getLogger(__name__)

MAX_WAITING_ROWS = 10_000
HANG_S = 60.0  # writers that write no row for so long, at the end, are waited for no longer


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
