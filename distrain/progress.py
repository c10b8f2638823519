"""Progress of what takes over two seconds, shown in a terminal by rank 0; elsewhere nothing.

A process has one live display, which the bar of the training (see `console`) and what is shown here
share: two would write over each other. Where there is no terminal no rich is imported, no thread is
started, and no control character is written. NO_COLOR takes the colours away.
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
"""What is over sooner is not shown."""

REFRESH_S = 0.2


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether a live display can be shown there; None is a closed descriptor."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class Display:
    """The live display of this process: a line for each thing that takes its time.

    It is there from the first line on until the last one is gone. Any thread may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._stream: TextIO | None = None

    def add(self, stream: TextIO, *, total: float | None, text: str) -> TaskID:
        """Add a line, on the stream of those that are there already.

        Args:
            stream: a terminal.
            total: of what is counted; None for what nobody can count.
            text: beside the bar.
        """
        with self._lock:
            if self._progress is None:
                self._progress, self._stream = _start(stream), stream
            task = self._progress.add_task("", total=total, text=text)
            self._progress.refresh()
            return task

    def update(self, task: TaskID, *, completed: float, total: float | None, text: str) -> None:
        """Say how far something is; drawn by the next `refresh`."""
        with self._lock:
            if self._progress is not None:
                self._progress.update(task, completed=completed, total=total, text=text)

    def refresh(self) -> None:
        """Draw all lines; costs milliseconds."""
        with self._lock:
            if self._progress is not None:
                self._progress.refresh()

    def remove(self, task: TaskID, *, keep: bool = False) -> None:
        """Take a line away; the last one ends the display.

        Args:
            task: the line.
            keep: leave it on the screen if it is the last one.
        """
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
        """Write a line of text to a stream, above the display if that is there."""
        if stream is None:
            return
        with self._lock:
            if self._progress is not None and stream is self._stream:
                self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                return
        with contextlib.suppress(OSError):  # a dead console ends no training
            stream.write(line + "\n")
            stream.flush()


display = Display()


def counted(
    items: Iterable[T], what: str, *, total: int, stream: TextIO | None = None
) -> Iterator[T]:
    """Yield the items, and show how many of them are done if they take over two seconds.

    Args:
        items: whatever is iterated over.
        what: is done with them, in a word or two: "evaluation".
        total: how many there are.
        stream: the terminal; the standard output by default.
    """
    stream = stream or sys.stdout
    if not _is_shown(stream):
        yield from items
        return
    begin = time.monotonic()
    task, due = None, begin + AFTER_S
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if now >= due:
                due = now + REFRESH_S
                text = f"{what}  {timedelta(seconds=int(now - begin))}"
                if task is None:
                    task = display.add(stream, total=total, text=text)
                display.update(task, completed=done, total=total, text=text)
                display.refresh()
            yield item
    finally:
        if task is not None:
            display.remove(task)


@contextmanager
def waiting(what: str | Callable[[], str], *, stream: TextIO | None = None) -> Iterator[None]:
    """Show that something is waited for, and how long, if that takes over two seconds.

    Args:
        what: in a few words, or what returns them anew; "" hides the line.
        stream: the terminal; the standard output by default.
    """
    stream = stream or sys.stdout
    if not _is_shown(stream):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(over, what, stream), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _draw(over: threading.Event, what: str | Callable[[], str], stream: TextIO) -> None:
    """Draw the line of `waiting` until it is over."""
    begin, task = time.monotonic(), None
    pause_s = AFTER_S
    while not over.wait(pause_s):
        pause_s = REFRESH_S
        words = what() if callable(what) else what
        if not words:
            if task is not None:
                display.remove(task)
                task = None
            continue
        text = f"{words}  {timedelta(seconds=int(time.monotonic() - begin))}"
        if task is None:
            task = display.add(stream, total=None, text=text)
        display.update(task, completed=0, total=None, text=text)
        display.refresh()
    if task is not None:
        display.remove(task)


def _is_shown(stream: TextIO) -> bool:
    if os.environ.get("RANK", "0") != "0" or not is_terminal(stream):
        return False
    import_rich()
    return True


def import_rich() -> None:
    """Import rich now, from the main thread.

    Its import draws from Python's `random`: a terminal would change training. The state is put
    back, which in another thread would be a race with the code that draws.
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
        """How many of how many; nothing where nobody can count."""

        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")

    # the text gives way on a narrow terminal, so that a line stays one line
    one_line = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    progress = Progress(
        Count(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False, table_column=one_line),
        console=Console(file=stream),
        auto_refresh=False,  # no thread of its own
        expand=True,
    )
    progress.start()
    return progress
