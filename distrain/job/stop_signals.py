"""Signals of a rank as stop requests to its trainer."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from distrain.trainer.trainer import Trainer

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class StopRequest:
    """Signal handler; `requested` is whether a signal asked for a stop."""

    requested = False
    _trainer: Trainer | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal and request the trainer's stop."""
        self.requested = True
        if self._trainer is not None:
            self._trainer.request_stop()

    def forward_to(self, trainer: Trainer) -> None:
        """Request the stop of this trainer on a signal, also on one that came before."""
        self._trainer = trainer
        if self.requested:
            trainer.request_stop()


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handle stop signals inside `with`: the ranks agree on an iteration, save there and leave."""
    stop = StopRequest()
    before = {}
    for number in _STOP_SIGNALS:
        # nohup, or the rank's agent, has set SIGHUP to be ignored
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        outer = before[number] = signal.signal(number, stop)
        # a signal that the command's own handler has noted counts
        stop.requested |= getattr(outer, "since", None) is not None
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
