"""Queue of a loader: items to its processes, and their batches."""

from __future__ import annotations

import os
import pickle
import select
from collections.abc import Sequence
from multiprocessing.queues import Queue
from typing import Any

from typing_extensions import override

from distrain.data.loader_errors import worker_error
from distrain.data.ring import Ring, SlotBatch

_HEADER = 4  # bytes of a message before its content


class LoaderQueue(Queue):  # type: ignore[type-arg]
    """Queue of one direction; an error is sent in place of a batch that cannot be pickled.

    Args:
        maxsize: of items, 0 is unlimited.
        ctx: context of the processes.
        rings: of the processes, by number.
    """

    # of the base class, but not in its type stubs
    _opid: int
    _reader: Any
    _sem: Any
    _thread: Any
    _writer: Any

    def __init__(self, maxsize: int, *, ctx: Any, rings: Sequence[Ring]) -> None:
        super().__init__(maxsize, ctx=ctx)
        self._rings = rings
        self._space = select.poll()
        self._space.register(self._writer, select.POLLOUT)
        ready = select.poll()
        ready.register(self._reader, select.POLLIN)
        # multiprocessing makes a selector for each call; a negative time would be without end
        self._poll = lambda timeout=0.0: bool(ready.poll(1000 * max(timeout, 0)))

    @override
    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Send an item.

        The training process sends a small one itself, if the pipe has space: a thread that sends it
        takes a third of the CPU of receiving a batch.
        """
        if self._thread is None and os.getpid() == self._opid:
            content = _pickled(obj)
            if 0 < len(content) <= select.PIPE_BUF - _HEADER and self._space.poll(0):
                self._sem.acquire()
                self._writer.send_bytes(content)
                return
        super().put(obj, block, timeout)

    @override
    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next item; a batch in a ring is taken from it."""
        item = super().get(block, timeout)
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], SlotBatch):
            return item[0], self._rings[item[1].worker].receive(item[1])
        return item

    def _on_queue_feeder_error(self, error: Exception, item: tuple[int, Any]) -> None:
        # multiprocessing prints the error and drops the batch: training would hang
        self.put((item[0], worker_error(error)))


def _pickled(item: Any) -> bytes:
    """Return an item as bytes; none if that takes more than pickle, which the thread has."""
    try:
        return pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return b""
