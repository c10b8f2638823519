"""Logging: rank 0 to the console and its log file, the other ranks to their log files."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

logger = logging.getLogger("distrain")


def report(text: str) -> None:
    """Print a line of the command; for processes that are no rank."""
    print(f"distrain: {text}", file=sys.stderr, flush=True)


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the sys.stderr of the moment: a live progress bar takes its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr


class _LogFile(logging.FileHandler):
    """A log file that survives failed writes: one warning, and the log continues when it can."""

    _has_warned = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening it
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_warned:
            self._has_warned = True
            why = error.strerror or error
            print(f"distrain: {self.baseFilename}: {why}; training goes on", file=sys.stderr)


def set_up(folder: str | Path, *, rank: int) -> None:
    """Send the log of this process where it belongs; rank 0 also writes `folder`/rank_0.log.

    The agent has pointed stderr of all ranks but 0 to their logs.
    """
    text = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    console = _CurrentStderr()
    console.setFormatter(logging.Formatter("distrain: %(message)s") if rank == 0 else text)
    handlers: list[logging.Handler] = [console]
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = _LogFile(Path(folder, "rank_0.log"), delay=True)
        file.setFormatter(text)
        handlers.append(file)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
