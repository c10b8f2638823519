"""Stop requests: signals to a launcher."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from distrain.process import stdio

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_BOUNCE_S = 0.5  # within which a terminal and a wrapper both send one Ctrl-C


class StopRequest:
    """Records, inside `with`, the signals that request a stop of this process.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are equal; an ignored SIGHUP, as under nohup, stays
    ignored. A second SIGINT (Ctrl-C) ends the wait. Outside of the main thread no signal is
    handled. A request that an outer `with` received counts in an inner one.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.since: float | None = None  # first signal or request, on the monotonic clock
        self.signals: list[str] = []  # names of all signals received
        self.at_once = False  # a second SIGINT came
        self.kill: Callable[[], object] = bool  # called then, in the handler; bool does nothing
        self.is_wanted: Callable[[], bool] = bool  # asked by `poll`: a stop without a signal
        self.is_quiet = is_quiet  # print nothing at a signal
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if self._before or threading.current_thread() is not threading.main_thread():
            return self
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            outer = self._before[number] = signal.signal(number, self)
            if isinstance(outer, StopRequest) and self.since is None:
                self.since, self.signals = outer.since, [*outer.signals]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._before = {}

    def poll(self) -> float | None:
        """Return `since`, which is now if a stop is wanted otherwise than by a signal."""
        if self.since is None and self.is_wanted():
            self.since = time.monotonic()
        return self.since

    def reset(self) -> None:
        """Forget a stop that no signal requested: the ranks have ended, and start again."""
        self.kill = bool
        # in this order no signal is lost that comes meanwhile
        self.since = None
        if self.signals:
            self.since = time.monotonic()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; the agent acts on it."""
        name, now = signal.Signals(number).name, time.monotonic()
        is_first = not self.signals
        self.signals.append(name)
        if is_first or self.since is None:
            self.since = now
            if not self.is_quiet:
                again = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
                stdio.notify(f"\ndistrain: {name}: the ranks save their state and stop{again}\n")
        elif number == signal.SIGINT and now - self.since > _BOUNCE_S:
            self.at_once = True
            with contextlib.suppress(Exception):  # the agent reads `at_once` too
                self.kill()


def ignore() -> None:
    """Ignore stop signals from here on: the process is about to leave with its exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
