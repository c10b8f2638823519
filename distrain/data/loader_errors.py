"""Exceptions in a loader process, sent to the process that trains."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import get_worker_info
from typing_extensions import override

from distrain.data.ring import Ring, SlotBatch
from distrain.errors import add_note

SHM_HINT = (
    "/dev/shm is full: give the container more by --shm-size=8g or --ipc=host, or set "
    "data.workers=0"
)
FILES_HINT = "the limit on open files (ulimit -n) is too low; raise it, or set data.workers=0"


@dataclass
class WorkerError:
    """An exception in a loader process; torch's own form hides its message below other lines."""

    error: Exception | None  # None if it cannot be pickled
    name: str
    text: str
    notes: list[str]
    trace: str

    def exception(self) -> Exception:
        """Return the exception, or a RuntimeError with its name and text."""
        if self.error is not None:
            return self.error
        error: Exception = type(self.name, (RuntimeError,), {})(self.text)
        for note in self.notes:
            add_note(error, note)
        return error


def worker_error(error: Exception) -> WorkerError:
    """Return the form in which a loader process sends an exception."""
    worker = get_worker_info()
    add_note(error, f"in DataLoader worker process {worker.id if worker else 0}")
    if re.search(r"shared memory|\bshm\b|file </torch_", str(error)):
        is_full = "Too many open files" not in str(error)
        add_note(error, SHM_HINT if is_full else FILES_HINT)
    trace = "".join(traceback.format_exception(error))
    sent = error if _survives_pickle(error) else None
    return WorkerError(sent, type(error).__name__, str(error), vars(error)["__notes__"], trace)


def _survives_pickle(error: Exception) -> bool:
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:  # any of the user's class
        return False


class ResultQueue(Queue):  # type: ignore[type-arg]
    """Queue of batches; an error is sent in place of a batch that cannot be pickled.

    Args:
        maxsize: of items, 0 is unlimited.
        ctx: context of the processes.
        rings: of the processes, by number.
    """

    def __init__(self, maxsize: int, *, ctx: Any, rings: Sequence[Ring]) -> None:
        super().__init__(maxsize, ctx=ctx)
        self._rings = rings

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
