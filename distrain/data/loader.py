"""The global stream of samples: the same for any number of ranks and of loader workers.

Iteration i trains on the samples at positions [i * B, (i + 1) * B) of an endless sequence of seeded
permutations of the data set, B being the batch over all ranks. A rank takes its share of it, so a
run can start at any iteration, on any number of ranks, and sees the same global batches.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from distrain.data.batch import batch_length, to_device
from distrain.data.permutation import Ints, permuted
from distrain.data.workers import Collate, Fetch, MicroBatch, WorkerBatches, length_of, load_here
from distrain.errors import ConfigError

__all__ = [
    "EvalLoader",
    "SampleStream",
    "TrainLoader",
    "batch_length",
    "micro_batches",
    "to_device",
]

_BLOCK = 4096  # positions worked out at once: numpy's calls cost as much for 1 as for 1000


class SampleStream:
    """The endless sequence of samples that all ranks share.

    Example: 3 samples in batches of 2, not shuffled: 0 1, 2 0, 1 2, 0 1, ... in the epochs 0 0,
    0 1, 1 1, 2 2, ...; shuffled, the three samples of each epoch are in an order of its own.

    Args:
        size: of the data set.
        batch_size: B, over all ranks.
        seed: of the run.
        shuffle: False repeats the data set in its own order.

    Raises:
        ConfigError: a number is too small.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        for key, value, least in (
            ("the length of the data set", size, 1),
            ("data.batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{key} is {value}; the least is {least}")
        self.size = size
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle

    def indices(self, iteration: int) -> tuple[Ints, Ints]:
        """Return the (B,) epochs and (B,) samples of an iteration's batch, in O(B) anywhere."""
        return self.at(iteration * self.batch_size, self.batch_size)

    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        """Return the (num,) epochs and (num,) samples from a position of the sequence on."""
        positions = np.arange(first, first + num, dtype=np.int64)
        epochs, positions = np.divmod(positions, self.size)
        if self._shuffle:
            positions = permuted(positions, size=self.size, seed=self._seed, epoch=epochs)
        return epochs, positions


def micro_batches(
    batch_size: int, *, ranks: int, accumulation: int = 1, largest: int | None = None
) -> int:
    """Return in how many forwards a rank takes its share of the batch.

    Without `largest` it is `accumulation`, checked. A run that continues on other ranks gives the
    samples a forward had before as `largest`; the result is then the least number, not under
    `accumulation`, that divides the share into forwards of at most so many. Example: 48 samples on
    4 ranks in forwards of 12; on 2 ranks with `largest=12` in 2 forwards each.

    Args:
        batch_size: B, over all ranks.
        ranks: how many there are.
        accumulation: forwards in a step as configured.
        largest: the most samples in a forward, >= 1; None sets no bound.

    Raises:
        ConfigError: the batch does not divide.
    """
    share, rest = divmod(batch_size, ranks)
    for number in [accumulation] if largest is None else range(accumulation, share + 1):
        if not rest and share % number == 0 and share // number <= (largest or share):
            return number
    unit = ranks * accumulation
    below = batch_size - batch_size % unit
    nearest = f"{below} or {below + unit}" if below else str(unit)
    raise ConfigError(
        f"data.batch_size={batch_size} does not divide by {ranks} ranks times "
        f"trainer.accumulation={accumulation}; the nearest that does: {nearest}"
    )


class _TrainPlan(Sampler[MicroBatch]):
    """Names the micro-batches of a rank, from an iteration on, without end."""

    def __init__(
        self, stream: SampleStream, *, start: int, rank: int, world_size: int, accumulation: int
    ) -> None:
        self._stream = stream
        self._start = start
        self._rank = rank
        # micro-batch m of all ranks together is the same set on any number of ranks
        self._shape = (-1, world_size, stream.batch_size // (world_size * accumulation))

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self._stream.batch_size
        first, num = self._start * size, max(1, _BLOCK // size) * size
        while True:
            block = (
                part.reshape(self._shape)[:, self._rank] for part in self._stream.at(first, num)
            )
            for epochs, samples in zip(*block, strict=True):
                yield MicroBatch(epochs, samples)
            first += num


class _EvalPlan(Sampler[MicroBatch]):
    """Names the batches of a rank's share of a data set."""

    def __init__(self, share: range, *, batch_size: int) -> None:
        self._share = share
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._share) // self._batch_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        for first in range(0, len(self._share), self._batch_size):
            part = self._share[first : first + self._batch_size]
            samples = np.arange(part.start, part.stop, dtype=np.int64)
            yield MicroBatch(np.zeros_like(samples), samples)


class TrainLoader:
    """This rank's micro-batches of the global stream.

    Iteration i is `accumulation` micro-batches: the global batch is cut into as many parts, and
    each part into one share a rank.

    Args:
        dataset: map-style: `len(dataset)` and `dataset[index]`. If it has `get_batch(indices)`,
            that takes (n,) int64 and returns the collated batch at once; `collate` is not called.
            If it has torch's `__getitems__`, that is used where samples are not seeded.
        batch_size: B, over all ranks.
        rank: of this process.
        world_size: number of ranks.
        accumulation: micro-batches in an iteration.
        seed: of the run.
        shuffle: False repeats the data set in its own order.
        workers: loader processes of this rank; 0 loads in the training process.
        seed_samples: seed python, numpy and torch before each sample from (seed, epoch, sample), so
            that augmentation does not depend on rank, worker or resumption, and leave the training
            process's generators alone. A `get_batch` is seeded once, by its first sample: what it
            draws depends on the number of ranks. False is for data sets that draw nothing, cheaper.
        collate: makes a batch of a list of samples; None is torch's default.
        pin_memory: give batches in page-locked memory, for faster copies to a GPU.

    Attributes:
        stream: the `SampleStream` of all ranks.
        accumulation: as above.
        samples_per_forward: in a micro-batch of this rank.

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
        workers: int = 0,
        seed_samples: bool = True,
        collate: Collate | None = None,
        pin_memory: bool = False,
    ) -> None:
        size = length_of(dataset, "data.train")
        self.stream = SampleStream(size, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self.accumulation = micro_batches(batch_size, ranks=world_size, accumulation=accumulation)
        self.samples_per_forward = batch_size // world_size // self.accumulation
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._fetch = Fetch(dataset, seed=seed if seed_samples else None, collate=collate)
        self._workers, self._pin_memory = workers, pin_memory
        self._open: weakref.WeakSet[WorkerBatches] = weakref.WeakSet()

    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the endless micro-batches from an iteration on; any start costs the same.

        With workers, their processes end with `close` or with the last reference to the batches.

        Args:
            start_iter: the first iteration, >= 0.
        """
        plan = _TrainPlan(
            self.stream,
            start=start_iter,
            rank=self._rank,
            world_size=self._world_size,
            accumulation=self.accumulation,
        )
        if self._workers == 0:
            return load_here(self._fetch, plan, pin_memory=self._pin_memory)
        batches = WorkerBatches(
            self._fetch,
            plan,
            workers=self._workers,
            pin_memory=self._pin_memory,
            seed=_worker_seed(self._seed, self._rank, start_iter),
        )
        self._open.add(batches)
        return batches

    def close(self) -> None:
        """End the loader processes; batches that were asked for before end, too."""
        for batches in [*self._open]:
            batches.close()


class EvalLoader:
    """This rank's share of a data set: over all ranks every sample once, without padding.

    Shares are contiguous and differ by at most one sample; a rank may have none.

    Args:
        dataset: as for `TrainLoader`.
        batch_size: the most samples in a batch of this rank.
        rank: of this process.
        world_size: number of ranks.
        workers: loader processes while it is iterated.
        seed: of the run; what the data set draws is the same in every evaluation.
        seed_samples: as for `TrainLoader`, with epoch 0.
        collate: as for `TrainLoader`.

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
        size = length_of(dataset, "data.eval")
        if batch_size < 1:
            raise ConfigError(f"data.eval_batch_size={batch_size}; it is at least 1 for each rank")
        self.batch_size = batch_size
        share = range(size * rank // world_size, size * (rank + 1) // world_size)
        self._plan = _EvalPlan(share, batch_size=batch_size)
        self._fetch = Fetch(dataset, seed=seed if seed_samples else None, collate=collate)
        self._workers = workers
        self._seed = _worker_seed(seed, rank, 0)

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of this rank."""
        return self.batches()

    def batches(self, max_batches: int | None = None) -> Iterator[Any]:
        """Yield the first batches of this rank; no others are loaded ahead.

        Args:
            max_batches: how many at most; None yields all.
        """
        plan = [*itertools.islice(self._plan, max_batches)]
        workers = min(self._workers, len(plan))
        if workers == 0:
            yield from load_here(self._fetch, plan, pin_memory=False)
            return
        batches = WorkerBatches(
            self._fetch, plan, workers=workers, pin_memory=False, seed=self._seed
        )
        try:
            yield from batches
        finally:
            batches.close()


def _worker_seed(seed: int, rank: int, start_iter: int) -> int:
    """Return a seed for the loader processes of a rank; no two ranks draw alike."""
    return int(np.random.SeedSequence([seed, rank, start_iter]).generate_state(1)[0])
