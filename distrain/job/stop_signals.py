"""Signals of a rank as stop requests to its trainer."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from distrain.log import logger
from distrain.trainer.trainer import Trainer

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class StopRequest:
    """Signal handler; `since` is the `time.monotonic()` of the first stop request, else None."""

    since: float | None = None
    _trainer: Trainer | None = None

    def __init__(self) -> None:
        self.numbers: list[signal.Signals] = []  # those that this handles

    @property
    def requested(self) -> bool:
        """Whether a signal asked for a stop."""
        return self.since is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal and request the trainer's stop."""
        self.since = self.since or time.monotonic()
        if self._trainer is not None:
            self._trainer.request_stop()

    def forward_to(self, trainer: Trainer) -> None:
        """Request the stop of this trainer on a signal, also on one that came before.

        Handlers that the model, the data or a library has set since are replaced: the run would be
        killed at its time limit without a checkpoint.
        """
        self._trainer = trainer
        for number in self.numbers:
            if signal.getsignal(number) is not self:
                other = signal.signal(number, self)
                logger.warning(
                    "%s requests a stop with a checkpoint: the handler %r, set while the run was "
                    "built, is replaced; a hook may set its own in before_train",
                    *(number.name, getattr(other, "__qualname__", other)),
                )
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
        stop.numbers.append(number)
        # a signal that the command's own handler has noted counts
        stop.since = stop.since or getattr(outer, "since", None)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
