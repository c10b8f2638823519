"""Forked worker processes of a rank: they ignore its signals and end with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe, current_process, popen_fork
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from distrain.data.loader_queue import LoaderQueue
from distrain.data.ring import Ring
from distrain.log import logger

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_START_S = 5.0  # for a fork to call `init_worker`, which it does in milliseconds
_IGNORED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class _Popen(popen_fork.Popen):
    """A fork that calls `init_worker`; one that hangs before is killed and forked again."""

    def _launch(self, process_obj: _Worker) -> None:
        # A lock that another thread holds at the fork is never released in the child. Python's own
        # child takes one first before 3.10.15 and 3.11.10, that of its list of threads
        # (python/cpython#112275): gloo's thread has it for a moment when a collective has ended.
        limit_s = _START_S
        while True:
            has_started, process_obj.started = Pipe(duplex=False)
            with has_started:
                with process_obj.started:  # closed here; the fork has its own
                    super()._launch(process_obj)  # type: ignore[misc]
                if has_started.poll(limit_s):
                    return
            text = "loader process %d did not start within %g s; it is forked again"
            logger.warning(text, self.pid, limit_s)
            self.kill()
            self.wait()
            self.close()
            self.returncode = None
            limit_s *= 2  # the machine may be that busy

    def terminate(self) -> None:
        self.kill()  # for torch and multiprocessing: SIGTERM is ignored, they would hang


class _Worker(ForkProcess):
    """A process that is killed at its deadline."""

    started: Connection  # closed by `init_worker`
    deadline: float | None = None  # on time.monotonic(), once its end was requested

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)

    def join(self, timeout: float | None = None) -> None:
        if self.deadline is not None:
            super().join(max(0.0, self.deadline - time.monotonic()))
            if self.is_alive():
                self.kill()
        super().join(timeout)


class WorkerContext(ForkContext):
    """Context of forked processes that `kill` ends; each calls `init_worker` first.

    Args:
        rings: of the processes, by number.
    """

    Process = _Worker

    def __init__(self, rings: Sequence[Ring]) -> None:
        super().__init__()
        self._rings = rings

    def Queue(self, maxsize: int = 0) -> LoaderQueue:
        """Return a queue of a loader: of its batches, or of the items of one process."""
        return LoaderQueue(maxsize, ctx=self, rings=self._rings)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block signals to processes started inside `with`, until `init_worker` ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(parent: int) -> None:
    """Ignore the rank's signals and end with the rank, whose process id is `parent`."""
    # a cluster signals every process; a worker that ended on it would fail the rank
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)
    process = current_process()
    assert isinstance(process, _Worker)
    process.started.close()
