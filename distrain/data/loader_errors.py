"""Exceptions in a loader process, sent to the process that trains."""

from __future__ import annotations

import pickle
import re
import traceback
from dataclasses import dataclass

from torch.utils.data import get_worker_info

from distrain.errors import add_note

SHM_HINT = (
    "/dev/shm is full: give the container more by --shm-size=8g or --ipc=host, or set "
    "data.workers=0"
)
FILES_HINT = "the limit on open files (ulimit -n) is too low; raise it, or set data.workers=0"


@dataclass
class WorkerError:
    """An exception in a loader process; torch's own form hides its message below other lines."""

    error: Exception | None  # None if it cannot be pickled, or means something else if raised
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
    # a StopIteration would end the loop over the batches, as if there were no more
    is_sent = not isinstance(error, StopIteration) and _survives_pickle(error)
    sent = error if is_sent else None
    return WorkerError(sent, type(error).__name__, str(error), vars(error)["__notes__"], trace)


def _survives_pickle(error: Exception) -> bool:
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:  # any of the user's class
        return False
