"""Progress bars and spinners of operations over two seconds, on the terminal of rank 0.

A process has one live display, shared with the bar of the training (`writers.console`): two would
overwrite each other. Without a terminal rich is not imported, no thread is started and no control
character is written. NO_COLOR removes colours.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

AFTER_S = 2.0
"""Minimum duration of an operation that is shown."""

REFRESH_S = 0.2
_WIDE = 90  # characters of a terminal with room for a long bar


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream can show a live display; None is a closed descriptor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class Display:
    """Live display of this process, one line per operation, while there is a line; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._stream: TextIO | None = None

    def add(self, stream: TextIO, *, total: float | None, text: str, times: str = "") -> TaskID:
        """Add a line, on the stream of existing lines; without a total it has no count.

        A narrow terminal cuts `text`, but not `times`.
        """
        with self._lock:
            if self._progress is None:
                self._progress, self._stream = _start(stream), stream
            task = self._progress.add_task("", total=total, text=text, times=times)
            self._progress.refresh()
            return task

    def update(
        self, task: TaskID, *, completed: float, total: float | None, text: str, times: str = ""
    ) -> None:
        """Update a line; the next `refresh` draws it."""
        with self._lock:
            if self._progress is not None:
                self._progress.update(
                    task, completed=completed, total=total, text=text, times=times
                )

    def refresh(self) -> None:
        """Draw all lines; costs milliseconds."""
        with self._lock:
            if self._progress is not None:
                self._progress.refresh()

    def remove(self, task: TaskID, *, keep: bool = False) -> None:
        """Remove a line; the last one ends the display, and stays on the screen with `keep`."""
        with self._lock:
            if self._progress is None:
                return
            is_last = len(self._progress.task_ids) == 1
            if not (keep and is_last):
                self._progress.remove_task(task)
            self._progress.refresh()
            if is_last:
                self._progress.stop()
                self._progress = self._stream = None

    def print(self, stream: TextIO | None, line: str) -> None:
        """Write a line of text to a stream, above the display."""
        if stream is None:
            return
        with self._lock:
            if self._progress is not None and stream is self._stream:
                self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                return
        with contextlib.suppress(OSError):  # a lost console must not end the training
            stream.write(line + "\n")
            stream.flush()


display = Display()


class _Line:
    """Line of the display, from its first `draw` to `clear`, with the elapsed time."""

    def __init__(self, stream: TextIO, total: float | None = None) -> None:
        self._stream, self._total = stream, total
        self._begin_s = time.monotonic()
        self._task: TaskID | None = None

    def draw(self, text: str, completed: float = 0) -> None:
        """Draw the line; costs milliseconds."""
        text = f"{text}  {timedelta(seconds=int(time.monotonic() - self._begin_s))}"
        if self._task is None:
            self._task = display.add(self._stream, total=self._total, text=text)
        display.update(self._task, completed=completed, total=self._total, text=text)
        display.refresh()

    def clear(self) -> None:
        """Remove the line."""
        if self._task is not None:
            display.remove(self._task)
            self._task = None


def counted(
    items: Iterable[T], name: str, *, total: int, stream: TextIO | None = None
) -> Iterator[T]:
    """Yield the items of an operation; show its name and count if it takes over two seconds."""
    stream = stream or sys.stdout
    if not _is_shown(stream):
        yield from items
        return
    line, due_s = _Line(stream, total), time.monotonic() + AFTER_S
    try:
        for done, item in enumerate(items):
            if time.monotonic() >= due_s:
                due_s = time.monotonic() + REFRESH_S
                line.draw(name, done)
            yield item
    finally:
        line.clear()


@contextmanager
def waiting(text: str | Callable[[], str], *, stream: TextIO | None = None) -> Iterator[None]:
    """Show a text, or a function's current text, and the time inside `with`, after two seconds."""
    stream = stream or sys.stdout
    if not _is_shown(stream):
        yield
        return
    over, line = threading.Event(), _Line(stream)

    def draw() -> None:
        pause_s = AFTER_S
        while not over.wait(pause_s):
            pause_s = REFRESH_S
            current = text() if callable(text) else text
            if current:
                line.draw(current)
            else:
                line.clear()
        line.clear()

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _is_shown(stream: TextIO) -> bool:
    if os.environ.get("RANK", "0") != "0" or not is_terminal(stream):
        return False
    import_rich()
    return True


def import_rich() -> None:
    """Import rich, from the main thread.

    Its import draws from Python's `random`, which would change training: the state is restored. In
    another thread that would be a race with code that draws.
    """
    state = random.getstate()
    import rich.console
    import rich.progress  # noqa: F401 - only where there is a terminal

    random.setstate(state)


def _start(stream: TextIO) -> Progress:
    from rich.console import Console  # only where there is a terminal
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Count(ProgressColumn):
        """Count and percentage of a line; empty without a total."""

        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text("")
            return Text(f"{task.completed:.0f}/{task.total:.0f} {int(task.percentage):3d}%")

    class Times(ProgressColumn):
        """Elapsed time and time left."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["times"])

    # on a narrow terminal the text is cut, so that a line stays one line
    one_line = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    console = Console(file=stream)
    progress = Progress(
        Count(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20 if console.width >= _WIDE else 8),
        Times(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[text]}", markup=False, table_column=one_line),
        console=console,
        auto_refresh=False,  # no thread of its own
        expand=True,
    )
    progress.start()
    return progress
