"""BackgroundWriter: the threads that pass rows to the writers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from distrain.errors import ConfigError
from distrain.writers.base import Row, RunInfo, Scalars, Writer

logger = logging.getLogger(__name__)

MAX_WAITING_ROWS = 10_000
MAX_WAITING_ROWS_OF_TRACKER = 1_000
TRACKER_END_S = 5.0  # for the trackers at the end of training, before the final checkpoint
HANG_S = 60.0  # at the end: writers that write no row for this time are given up


class BackgroundWriter:
    """Opens writers and passes rows to them in threads: training pays for queues, no disk.

    One thread has all writers of local files, and each tracker (`Writer.is_remote`) has its own: a
    server that hangs holds up neither the files nor training.

    Args:
        writers: each gets every row; those of one thread in this order.
        run: the run that they are opened for; a ConfigError of `open` is raised.
    """

    def __init__(self, writers: Iterable[Writer], run: RunInfo) -> None:
        writers = list(writers)
        files = [writer for writer in writers if not writer.is_remote]
        self._files = WriterThread("distrain-writers", files, run)
        self._trackers = [
            WriterThread(f"distrain-{type(writer).__name__}", [writer], run, is_remote=True)
            for writer in writers
            if writer.is_remote
        ]
        self._threads = [self._files, *self._trackers]
        for thread in self._threads:  # after all writers are open, as one may raise
            thread.start()

    def write(self, row: Row) -> None:
        """Queue a row; its arrays and mappings must not change afterwards."""
        for thread in self._threads:
            thread.write(row)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Queue the end of a finished run."""
        for thread in self._threads:
            thread.finish(metrics)

    def flush(self) -> None:
        """Wait until every queued row is in the files, unless their writers hang."""
        self._files.flush()

    def close(self) -> None:
        """Wait until all rows are written and all writers are closed, unless they hang.

        A tracker that needs more than TRACKER_END_S is not waited for: the final checkpoint may
        follow. Its thread goes on, and Python waits for it at the end of the process.
        """
        for thread in self._threads:
            thread.end()
        self._files.join()
        deadline_s = time.monotonic() + TRACKER_END_S
        for thread in self._trackers:
            thread.join(deadline_s - time.monotonic())


class WriterThread:
    """The thread of some writers, and its queue.

    A writer that fails costs one warning, not the run; it gets the next row all the same, as a full
    disk may be emptied. Its losses are reported when it is closed. While the writers hang, at most
    MAX_WAITING_ROWS rows wait, 1,000 for a tracker, and later ones are dropped, counted and
    reported. A writer that cannot be opened gets no rows.

    Args:
        name: of the thread.
        writers: each gets every row, in this order.
        run: the run that they are opened for; a ConfigError of `open` is raised.
        is_remote: whether it is the thread of a tracker.
    """

    def __init__(
        self, name: str, writers: Iterable[Writer], run: RunInfo, *, is_remote: bool = False
    ) -> None:
        self._new_of = NewScalars(run.start_iteration)
        self._failing: set[int] = set()  # ids of writers
        self._hang = f"{name.removeprefix('distrain-')} hangs" if is_remote else "the writers hang"
        self._max_rows = MAX_WAITING_ROWS_OF_TRACKER if is_remote else MAX_WAITING_ROWS
        self._dropped = 0
        self._is_ended = False
        self._writers = [w for w in writers if self._attempt(w, w.open, run, fatal=ConfigError)]
        # an Event is set when the rows before it are written; a mapping is that of `finish`
        self._items: SimpleQueue[Row | Mapping[str, float] | Event | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=not is_remote)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def write(self, row: Row) -> None:
        """Queue a row, or drop it."""
        if self._items.qsize() < self._max_rows:
            self._items.put(row)
            return
        if not self._dropped:
            logger.warning("%s: rows from iteration %d on are lost", self._hang, row.iteration)
        self._dropped += 1

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Queue the end of a finished run."""
        self._items.put(metrics)

    def flush(self) -> None:
        """Wait until every queued row is written, unless the writers hang."""
        written = Event()
        self._items.put(written)
        self._wait(written.wait, written.is_set)

    def end(self) -> None:
        """Queue the end of the thread."""
        if not self._is_ended:
            self._items.put(None)
            self._is_ended = True
            if self._dropped:
                logger.warning("%s: %d rows were lost", self._hang, self._dropped)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the thread; without a limit as long as the queue gets shorter."""
        if timeout_s is not None:
            self._thread.join(max(0.0, timeout_s))
            return
        self._wait(self._thread.join, lambda: not self._thread.is_alive())
        if self._thread.is_alive():
            logger.warning("%s: rows not written within %g s are lost", self._hang, HANG_S)

    def _wait(self, wait: Callable[[float], object], is_done: Callable[[], bool]) -> None:
        """Wait while the queue gets shorter."""
        waiting = self._items.qsize() + 1
        while self._thread.is_alive() and not is_done() and waiting > self._items.qsize():
            waiting = self._items.qsize()
            wait(HANG_S)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            if isinstance(item, Event):
                item.set()
            elif isinstance(item, Row):
                row = replace(item, new=self._new_of(item.scalars))
                # a tracker writes nothing of a row without news: no sign that it works again
                has_news = bool(row.new or row.images or row.histograms)
                for writer in self._writers:
                    self._attempt(writer, writer.write, row, recovers=has_news)
            else:
                for writer in self._writers:
                    self._attempt(writer, writer.finish, item, at_end=True)
        for writer in self._writers:
            self._attempt(writer, writer.close, at_end=True)

    def _attempt(
        self,
        writer: Writer,
        method: Callable[..., None],
        *args: Any,
        at_end: bool = False,
        recovers: bool = True,
        fatal: type[Exception] | tuple[()] = (),
    ) -> bool:
        """Call a method of a writer; return whether it succeeded.

        An error of a type in `fatal` is raised, others are logged: before the end only the first.
        A success of one that failed is logged if it `recovers`.
        """
        name = type(writer).__name__
        try:
            method(*args)
        except fatal:
            raise
        except Exception as error:
            if at_end or id(writer) not in self._failing:
                self._failing.add(id(writer))
                lost = "its end is missing" if at_end else "training goes on without"
                # the text of an OSError suffices; any other error needs its traceback
                trace = None if isinstance(error, OSError) else error
                logger.warning("%s: %s; %s", name, error, lost, exc_info=trace)
            return False
        if recovers and id(writer) in self._failing:
            self._failing.discard(id(writer))
            logger.info("%s works again", name)
        return True


class NewScalars:
    """Selects the scalars of a row that no earlier row held.

    Args:
        start_iteration: the first iteration of this attempt; older values are written already.
    """

    def __init__(self, start_iteration: int) -> None:
        self._oldest = start_iteration
        self._next: dict[str, int] = {}

    def __call__(self, scalars: Scalars) -> Scalars:
        """Return the new ones, in the same order."""
        known, oldest = self._next, self._oldest
        new = {n: scalar for n, scalar in scalars.items() if scalar[1] >= known.get(n, oldest)}
        known.update((name, iteration + 1) for name, (_, iteration) in new.items())
        return new
