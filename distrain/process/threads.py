"""Time limit for non-daemon threads at the end of a process."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from distrain.log import logger
from distrain.process import stdio

GRACE_S = 10.0
"""Seconds for non-daemon threads after the shutdown of the interpreter begins."""


def limit_exit(code: int) -> None:
    """End this process with its exit code if a thread is alive GRACE_S after the shutdown begins.

    The thread is named in the log. Without a non-daemon thread this does nothing.
    """
    if _non_daemons():
        # Python joins these threads before it runs `atexit`, and runs this registry before that
        module: Any = threading
        module._register_atexit(_start_timer, code)


def _start_timer(code: int) -> None:
    timer = threading.Timer(GRACE_S, _end, args=(code,))
    timer.daemon = True
    timer.start()


def _end(code: int) -> None:
    names = ", ".join(sorted(thread.name for thread in _non_daemons()))
    if names:  # else the process is ending
        logger.warning(
            "thread %s still ran %g s after the end of the job: ended with exit code %d; join it "
            "in after_train, or make it a daemon thread",
            names,
            GRACE_S,
            code,
        )
        for stream in (sys.stdout, sys.stderr):
            stdio.flush(stream)
        os._exit(code)


def _non_daemons() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
