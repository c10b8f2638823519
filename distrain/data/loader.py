"""Loaders of a rank: endless training batches, and each evaluation sample once."""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from typing_extensions import override

from distrain.checks import whole
from distrain.data.collate import BatchReader, Collate, Fetch, length_of, load_here
from distrain.data.samplers import SampleOrder, Shuffled
from distrain.data.stream import eval_batches, micro_batches, train_batches
from distrain.data.workers import WorkerBatches


class Loader(ABC):
    """Training data of one rank; base class of `data.loader._target_`.

    Its constructor may take any of `dataset` (that of `data.train`), `batch_size` (over all
    ranks), `rank`, `world_size`, `accumulation`, `seed`, `workers`, `seed_samples`, `collate` and
    `pin_memory`; other keywords come from the node.

    Attributes:
        num_samples: per epoch; None if unknown.
        samples_per_forward: of this rank; None if unknown or not constant.
        is_seekable: whether `batches` may be called for any iteration at any time.
        iters_per_epoch: None if it follows from the two, or is unknown.
    """

    num_samples: int | None = None
    samples_per_forward: int | None = None
    is_seekable = True
    iters_per_epoch: Fraction | None = None

    @abstractmethod
    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return endless batches, `accumulation` per iteration, from an iteration on.

        A run that resumes at `start_iter` must get the batches that an uninterrupted run gets.
        """

    def state_dict(self) -> Any:
        """Return this rank's position for `load_state_dict`; None if its iteration is enough."""
        return None

    def load_state_dict(  # noqa: B027 - no state by default
        self, states: Sequence[Any], *, iteration: int, rank: int
    ) -> None:
        """Take a saved position; the next `batches(iteration)` continues there.

        Args:
            states: what `state_dict` returned on each rank of the run that was saved.
            iteration: number of iterations that it had done.
            rank: of this process.
        """

    def close(self) -> None:  # noqa: B027 - nothing to end by default
        """End processes and threads of the loader; training has ended."""


class WorkerLoader(Loader):
    """A loader whose batches come from `workers` processes; 0 loads in this one.

    Its constructor sets `_workers`, `_pin_memory`, `_seed` and `_rank`.
    """

    _workers: int
    _pin_memory: bool
    _seed: int
    _rank: int

    def _load(self, reader: BatchReader, items: Iterable[Any], start_iter: int) -> Iterator[Any]:
        """Return the batches that a reader makes of the items, in their order."""
        if self._workers == 0:
            return load_here(reader, items, pin_memory=self._pin_memory)
        batches = WorkerBatches(
            reader,
            items,
            workers=self._workers,
            seed=worker_seed(self._seed, self._rank, start_iter),
            pin_memory=self._pin_memory,
        )
        self._open.add(batches)
        return batches

    @cached_property
    def _open(self) -> weakref.WeakSet[WorkerBatches]:
        return weakref.WeakSet()

    @override
    def close(self) -> None:
        for batches in [*self._open]:
            batches.close()


class TrainLoader(WorkerLoader):
    """This rank's micro-batches of the global stream of a map-style data set.

    Args:
        dataset: map-style, with `len(dataset)` and `dataset[index]`. If it has
            `get_batch(indices)`, that takes (n,) int64 and returns the collated batch; `collate` is
            not called. torch's `__getitems__` is used where samples are not seeded.
        batch_size: B, over all ranks.
        rank: of this process.
        world_size: number of ranks.
        accumulation: micro-batches per iteration of a rank; the loader returns one at a time.
        seed: of the run.
        shuffle: False repeats the data set in its own order.
        sampler: another order of samples, see `distrain.data.samplers`; equal on all ranks.
        workers: loader processes of this rank; 0 loads in the training process.
        seed_samples: seed python, numpy and torch before each sample from (seed, epoch, sample), so
            that augmentation does not depend on rank, worker or resumption, and leave the training
            process's generators alone. A `get_batch` is seeded once, by its first sample: its
            random numbers depend on the number of ranks. False is for data sets that draw nothing,
            and faster.
        collate: makes a batch of a list of samples; None is torch's default.
        pin_memory: return batches in page-locked memory, for faster copies to a GPU.

    Raises:
        ConfigError: the data set is empty or not map-style, or the batch does not divide.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        sampler: SampleOrder | None = None,
        workers: int = 0,
        seed_samples: bool = True,
        collate: Collate | None = None,
        pin_memory: bool = False,
    ) -> None:
        size = length_of(dataset, "data.train")
        self.num_samples = size if sampler is None else sampler.per_epoch or size
        self._batch_size = whole("data.batch_size", batch_size, least=1)
        whole("seed", seed, least=0)
        self._order = sampler or Shuffled(size, seed=seed, shuffle=shuffle)
        self.accumulation = micro_batches(batch_size, ranks=world_size, accumulation=accumulation)
        self.samples_per_forward = batch_size // world_size // self.accumulation
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._fetch = Fetch(dataset, seed=seed if seed_samples else None, collate=collate)
        self._workers, self._pin_memory = workers, pin_memory

    @override
    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the endless micro-batches from an iteration on; any start costs the same.

        With workers, their processes end with `close` or with the last reference to the batches.
        """
        batches = train_batches(
            self._order,
            batch_size=self._batch_size,
            start=start_iter,
            rank=self._rank,
            world_size=self._world_size,
            accumulation=self.accumulation,
        )
        return self._load(self._fetch, batches, start_iter)


class EvalLoader:
    """This rank's part of a data set: over all ranks every sample once, without padding.

    Parts are contiguous and differ by at most one sample; that of a rank may be empty.

    Args:
        dataset: as for `TrainLoader`.
        batch_size: most samples in a batch of this rank.
        rank: of this process.
        world_size: number of ranks.
        workers: loader processes while it is iterated.
        seed: of the run; the data set draws the same numbers in every evaluation.
        seed_samples: as for `TrainLoader`, with epoch 0.
        collate: as for `TrainLoader`.

    Attributes:
        num_samples: of the data set.

    Raises:
        ConfigError: the data set is empty or not map-style.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        seed: int = 0,
        seed_samples: bool = True,
        collate: Collate | None = None,
    ) -> None:
        self.num_samples = length_of(dataset, "data.eval")
        self.batch_size = whole("data.eval_batch_size", batch_size, least=1)
        self.rank, self._world_size = rank, world_size
        self._share = _share(self.num_samples, rank, world_size)
        self._fetch = Fetch(dataset, seed=seed if seed_samples else None, collate=collate)
        self._workers = workers
        self._seed = worker_seed(seed, rank, 0)

    def limited(self, limit: int) -> EvalLoader:
        """Return a loader of the set's first samples, `limit` at most over all ranks."""
        first = copy.copy(self)
        first.num_samples = min(limit, self.num_samples)
        first._share = _share(first.num_samples, self.rank, self._world_size)
        return first

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return -(-len(self._share) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def batches(self, max_batches: int | None = None) -> Iterator[Any]:
        """Yield the first `max_batches` (None: all) of this rank; no others are loaded ahead."""
        end = None if max_batches is None else max_batches * self.batch_size
        sampler = eval_batches(self._share[:end], batch_size=self.batch_size)
        workers = min(self._workers, len(sampler))
        if workers == 0:
            yield from load_here(self._fetch, sampler)
            return
        batches = WorkerBatches(self._fetch, sampler, workers=workers, seed=self._seed)
        try:
            yield from batches
        finally:
            batches.close()


def _share(size: int, rank: int, world_size: int) -> range:
    """Return the part of `size` samples that a rank takes."""
    return range(size * rank // world_size, size * (rank + 1) // world_size)


def worker_seed(seed: int, rank: int, start_iter: int) -> int:
    """Return a seed for the loader processes of a rank, another one for each rank."""
    return int(np.random.SeedSequence([seed, rank, start_iter]).generate_state(1)[0])
