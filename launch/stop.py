"""Signals that ask a launcher to stop what it has started."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_BOUNCE_S = 0.5  # a terminal and a wrapper may both pass on one Ctrl-C


class StopRequest:
    """Says, inside `with`, whether this process was asked to stop.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 ask to stop, all alike. A second SIGINT (Ctrl-C) does not
    wait any longer. Outside of the main thread no signal is heard.

    Attributes:
        since: when the first signal came, on the monotonic clock; None until then.
        signals: names of all signals that came.
        at_once: whether a second SIGINT came.
        kill: called then, in the signal handler.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.signals: list[str] = []
        self.at_once = False
        self.kill: Callable[[], None] = _nothing
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in LISTENED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the rest is done where the ranks are watched."""
        name, now = signal.Signals(number).name, time.monotonic()
        self.signals.append(name)
        if self.since is None:
            self.since = now
            again = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
            text = f"\ndistrain: {name}: the ranks save their state and stop{again}\n"
            os.write(2, text.encode())
        elif number == signal.SIGINT and now - self.since > _BOUNCE_S:
            self.at_once = True
            self.kill()


def _nothing() -> None:
    """Kill nothing: no ranks have been started yet."""
