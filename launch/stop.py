"""Signals that ask a launcher to stop what it has started."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from distrain.process import stdio

LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_BOUNCE_S = 0.5  # a terminal and a wrapper may both pass on one Ctrl-C


class StopRequest:
    """Says, inside `with`, whether this process was asked to stop.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 ask to stop, all alike; a SIGHUP that is ignored
    already, as under nohup, stays so. A second SIGINT (Ctrl-C) does not wait any longer. Outside of
    the main thread no signal is heard. A request that an outer `with` received counts in an inner.

    Args:
        is_quiet: print nothing at a signal.

    Attributes:
        since: when the first signal came, on the monotonic clock; None until then.
        signals: names of all signals that came.
        at_once: whether a second SIGINT came.
        kill: called then, in the signal handler.
    """

    def __init__(self, *, is_quiet: bool = False) -> None:
        self.since: float | None = None
        self.signals: list[str] = []
        self.at_once = False
        self.kill: Callable[[], None] = _nothing
        self._is_quiet = is_quiet
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if self._before or threading.current_thread() is not threading.main_thread():
            return self
        for number in LISTENED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            outer = self._before[number] = signal.signal(number, self)
            if isinstance(outer, StopRequest) and self.since is None:
                self.since, self.signals = outer.since, [*outer.signals]
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

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the rest is done where the ranks are watched."""
        name, now = signal.Signals(number).name, time.monotonic()
        self.signals.append(name)
        if self.since is None:
            self.since = now
            if not self._is_quiet:
                again = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
                stdio.notify(f"\ndistrain: {name}: the ranks save their state and stop{again}\n")
        elif number == signal.SIGINT and now - self.since > _BOUNCE_S:
            self.at_once = True
            with contextlib.suppress(Exception):  # it is seen where the ranks are watched, too
                self.kill()


def ignore() -> None:
    """Ignore from here on what asks to stop: the process is about to leave with its exit code."""
    for number in LISTENED:
        signal.signal(number, signal.SIG_IGN)


def _nothing() -> None:
    """Kill nothing: no ranks have been started yet."""
