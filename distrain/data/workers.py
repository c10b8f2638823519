"""Batches from the loader processes of a rank."""

from __future__ import annotations

import atexit
import os
import signal
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import profiler
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from distrain.data.collate import BatchReader
from distrain.data.loader_errors import SHM_HINT, WorkerError, worker_error
from distrain.data.ring import Ring, RingWriter
from distrain.data.worker_process import WorkerContext, init_worker, signals_held

_GRACE_S = 1.0  # for a worker to finish its sample


class _InWorker(Dataset[Any]):
    """A `BatchReader` in a loader process: an exception is returned instead of a batch."""

    def __init__(self, fetch: BatchReader, rings: list[Ring]) -> None:
        self._fetch, self._rings = fetch, rings
        self._writer: RingWriter | None = None

    def __getitem__(self, item: Any) -> Any:
        try:
            if self._writer is None:
                worker = get_worker_info()
                assert worker is not None
                self._writer = RingWriter(self._rings[worker.id], worker.id)
            return self._writer.load(self._fetch, item)
        except Exception as error:
            return worker_error(error)


class WorkerBatches(Iterator[Any]):
    """Batches from loader processes, in the order of a sampler.

    The processes ignore the signals that a cluster sends to every process of a job, end with the
    rank, and are ended by `close`, with the last reference, and at exit. Large tensors come in
    reused shared memory (`distrain.data.ring`): it is written again once the last of them is gone.

    Args:
        fetch: of the data set.
        sampler: the micro-batches, in order; a process loads a whole one.
        workers: number of processes.
        seed: of the generators in each process, for a `fetch` that does not seed samples.
        pin_memory: return page-locked memory, if there is an accelerator.
    """

    def __init__(
        self,
        fetch: BatchReader,
        sampler: Iterable[Any],
        *,
        workers: int,
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        parent = os.getpid()
        rings = [Ring() for _ in range(workers)]
        loader: DataLoader[Any] = DataLoader(
            _InWorker(fetch, rings),
            sampler=sampler,
            batch_size=None,  # an item is a batch already
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            worker_init_fn=lambda _: init_worker(parent),
            multiprocessing_context=WorkerContext(rings),
            # torch would draw the workers' seed from the generator of the training process
            generator=torch.Generator().manual_seed(seed),
        )
        with signals_held():
            self._iterator: Any = iter(loader)
        _open.add(self)

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            RuntimeError: a process ended by itself.
            Exception: that of the data set; its notes name the process and the sample.
        """
        if self._iterator is None:
            raise RuntimeError("the loader of these batches was closed; call batches() again")
        try:
            if profiler._is_profiler_enabled:
                batch = next(self._iterator)
            else:  # torch's range for the profiler costs a tenth of a batch
                batch = self._iterator._next_data()
        except (RuntimeError, OSError, EOFError) as error:
            # of the data set, or from the pipe whose other end is closed
            for worker in self._iterator._workers:
                worker.join(0.1)
                if worker.exitcode:
                    hint = "-9 is mostly a lack of memory: try fewer data.workers"
                    if worker.exitcode == -signal.SIGBUS:
                        hint = SHM_HINT
                    raise RuntimeError(
                        f"loader process {worker.pid} ended with exit code {worker.exitcode}; "
                        f"{hint}"
                    ) from error
            raise
        if isinstance(batch, WorkerError):
            raise batch.exception() from RuntimeError(batch.trace)
        return batch

    def close(self) -> None:
        """End the processes; those at work on a sample have a second to finish it."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        if iterator._worker_pids_set:  # from here on a worker that ends is no failure
            watch: Any = signal_handling
            watch._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.deadline = time.monotonic() + _GRACE_S
        iterator._shutdown_workers()

    def __del__(self) -> None:
        if getattr(self, "_iterator", None) is not None:
            self.close()


_open: weakref.WeakSet[WorkerBatches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for batches in [*_open]:
        batches.close()


def _identity(batch: Any) -> Any:
    return batch
