"""How samples become batches: in the training process, or in loader processes of a rank."""

from __future__ import annotations

import atexit
import os
import random
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from distrain.data.loader_errors import SHM_HINT, Failed, failed
from distrain.data.permutation import Ints, sample_seeds
from distrain.data.worker_process import WorkerContext, init_worker, signals_held
from distrain.errors import ConfigError, add_note

Collate = Callable[[list[Any]], Any]

_GRACE_S = 1.0  # for a worker to end what it is doing


class MicroBatch(NamedTuple):
    """Which samples one rank loads for one forward."""

    epochs: Ints  # (n,)
    samples: Ints  # (n,)


def length_of(dataset: Any, key: str) -> int:
    """Return the length of a map-style data set.

    Args:
        dataset: any object.
        key: of the configuration, for the error.

    Raises:
        ConfigError: it is empty, or has no length or no items.
    """
    has_items = hasattr(dataset, "__getitem__") or hasattr(dataset, "get_batch")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and has_items):
        raise ConfigError(
            f"{key}: {type(dataset).__name__} is not a map-style data set; the stream needs "
            "__len__, and __getitem__ or get_batch (an iterable can be given to Trainer itself)"
        )
    size = len(dataset)
    if size < 1:
        raise ConfigError(f"{key}: {type(dataset).__name__} has length 0; give it samples")
    return size


class Fetch(Dataset[Any]):
    """A data set whose items are whole micro-batches of another.

    Args:
        dataset: map-style; see `data.TrainLoader`.
        seed: of the run, for what the data set draws; None when it draws nothing.
        collate: makes a batch of a list of samples; None is torch's default.
    """

    def __init__(self, dataset: Any, *, seed: int | None, collate: Collate | None) -> None:
        self._dataset = dataset
        self._collate = collate or default_collate
        self._get_batch = getattr(dataset, "get_batch", None)
        if type(dataset) is TensorDataset and collate is None:
            # the same batch as sample by sample, in one indexing a tensor
            self._get_batch = lambda indices: [tensor[indices] for tensor in dataset.tensors]
            seed = None
        self._seed = seed

    @property
    def draws(self) -> bool:
        """Whether loading an item sets the random generators of the process."""
        return self._seed is not None

    def __getitem__(self, item: MicroBatch) -> Any:
        if self._get_batch is not None:
            if self._seed is not None:
                first = sample_seeds(item.epochs[:1], item.samples[:1], seed=self._seed)
                _set_generators(int(first[0]))
            return self._get_batch(torch.from_numpy(item.samples))
        indices = item.samples.tolist()
        if self._seed is not None:
            seeds = sample_seeds(item.epochs, item.samples, seed=self._seed).tolist()
            return self._collate([self._one(*of) for of in zip(indices, seeds, strict=True)])
        many = getattr(self._dataset, "__getitems__", None)
        if many is not None:
            return self._collate(many(indices))
        return self._collate([self._one(index, None) for index in indices])

    def _one(self, index: int, seed: int | None) -> Any:
        if seed is not None:
            _set_generators(seed)
        try:
            return self._dataset[index]
        except Exception as error:
            add_note(error, f"while loading sample {index} of {type(self._dataset).__name__}")
            raise


def _set_generators(seed: int) -> None:
    """Seed python, numpy and torch's generator of the CPU with a seed of 64 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)


def load_here(fetch: Fetch, plan: Iterable[MicroBatch], *, pin_memory: bool) -> Iterator[Any]:
    """Load in this process; what samples draw leaves the process's own generators alone.

    Args:
        fetch: of the data set.
        plan: what to load, in order.
        pin_memory: give page-locked memory, where there is an accelerator.
    """
    pin_memory = pin_memory and torch.accelerator.is_available()
    for item in plan:
        if fetch.draws:
            states = random.getstate(), np.random.get_state(), torch.get_rng_state()
            try:
                batch = fetch[item]
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
                torch.set_rng_state(states[2])
        else:
            batch = fetch[item]
        yield pinned(batch) if pin_memory else batch


class _InWorker(Dataset[Any]):
    """`Fetch` in a loader process: an exception is returned instead of a batch."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def __getitem__(self, item: MicroBatch) -> Any:
        try:
            return self._fetch[item]
        except Exception as error:
            return failed(error)


class WorkerBatches(Iterator[Any]):
    """Batches that loader processes make, in the order of a plan.

    The processes ignore the signals that a cluster sends to every process of a job, end with the
    process that trains, and are ended by `close`, with the last reference, and at exit.

    Args:
        fetch: of the data set.
        plan: what to load, in order; a process loads a whole micro-batch.
        workers: how many processes.
        pin_memory: give page-locked memory, where there is an accelerator.
        seed: of the generators in each process, for a `fetch` that does not seed samples.
    """

    def __init__(
        self,
        fetch: Fetch,
        plan: Iterable[MicroBatch],
        *,
        workers: int,
        pin_memory: bool,
        seed: int,
    ) -> None:
        parent = os.getpid()
        loader: DataLoader[Any] = DataLoader(
            _InWorker(fetch),
            sampler=plan,
            batch_size=None,  # an item is a batch already
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=lambda _: init_worker(parent),
            multiprocessing_context=WorkerContext(),
            # torch would draw the workers' seed from the generator of the training process
            generator=torch.Generator().manual_seed(seed),
        )
        with signals_held():
            self._iterator: Any = iter(loader)
        _open.add(self)

    def __next__(self) -> Any:
        """Return the next batch of the plan.

        Raises:
            RuntimeError: a process ended by itself.
            Exception: that of the data set; its notes name the process and the sample.
        """
        if self._iterator is None:
            raise RuntimeError("the loader of these batches was closed; ask it for new ones")
        try:
            batch = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            # of the data set, or from the pipe whose other end is gone
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
        if isinstance(batch, Failed):
            raise batch.exception() from RuntimeError(batch.trace)
        return batch

    def close(self) -> None:
        """End the processes: those that work on a sample have a second to finish it."""
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


def _as_it_is(batch: Any) -> Any:
    return batch
