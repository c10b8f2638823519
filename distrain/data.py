"""The global stream of samples: the same for any number of ranks and of loader workers.

Iteration i trains on the samples at positions [i * B, (i + 1) * B) of an endless sequence of seeded
permutations of the data set, B being the batch over all ranks. A rank takes its share of it, so a
run can start at any iteration, on any number of ranks, and sees the same global batches.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from distrain.errors import ConfigError
from distrain.permutation import Ints, permuted, sample_seeds

Collate = Callable[[list[Any]], Any]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class SampleStream:
    """The endless sequence of samples that all ranks share.

    Args:
        size: of the data set.
        batch_size: B, over all ranks.
        seed: of the run.
        shuffle: False repeats the data set in its own order.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise ConfigError("the data set has length 0; training needs at least one sample")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size={batch_size}; it is at least 1")
        self.size = size
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle

    def indices(self, iteration: int) -> tuple[Ints, Ints]:
        """Return the (B,) epochs and (B,) samples of an iteration's batch, in O(B) anywhere."""
        first = iteration * self.batch_size
        epochs, positions = np.divmod(
            np.arange(first, first + self.batch_size, dtype=np.int64), self.size
        )
        if not self._shuffle:
            return epochs, positions
        samples = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            samples[here] = permuted(positions[here], size=self.size, seed=self._seed, epoch=epoch)
        return epochs, samples


def micro_batches(
    batch_size: int, *, ranks: int, accumulation: int = 1, largest: int | None = None
) -> int:
    """Return in how many forwards a rank takes its share of the batch.

    It is the smallest number, not under `accumulation`, that divides the share, so that a forward
    gets at most `largest` samples.

    Args:
        batch_size: B, over all ranks.
        ranks: how many there are.
        accumulation: forwards in a step as configured.
        largest: the most samples in a forward; None sets no bound.

    Raises:
        ConfigError: the batch does not divide.
    """
    unit = ranks * accumulation
    if batch_size % unit:
        below = batch_size - batch_size % unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide by {ranks} ranks times "
            f"trainer.accumulation={accumulation}; the nearest that does: {nearest}"
        )
    share = batch_size // ranks
    for number in range(accumulation, share + 1):
        if share % number == 0 and (largest is None or share // number <= largest):
            return number
    return share


class _MicroBatch(NamedTuple):
    """What one rank loads for one forward: (n,) epochs and (n,) samples."""

    epochs: Ints
    samples: Ints


class _Fetch(Dataset[Any]):
    """A data set whose items are whole micro-batches."""

    def __init__(self, dataset: Any, *, seed: int | None, collate: Collate | None) -> None:
        self._dataset = dataset
        self._seed = seed  # None: the data set draws nothing
        self._collate = collate or default_collate
        self._get_batch = getattr(dataset, "get_batch", None)

    def __getitem__(self, item: _MicroBatch) -> Any:
        if self._get_batch is not None:
            return self._get_batch(torch.from_numpy(item.samples))
        if self._seed is None:
            many = getattr(self._dataset, "__getitems__", None)
            indices = item.samples.tolist()
            return self._collate(many(indices) if many else [self._dataset[i] for i in indices])
        seeds = sample_seeds(item.epochs, item.samples, seed=self._seed).tolist()
        return self._collate(
            [self._seeded(i, s) for i, s in zip(item.samples.tolist(), seeds, strict=True)]
        )

    def _seeded(self, index: int, seed: int) -> Any:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed >> 1)
        return self._dataset[index]


class _Plan(Sampler[_MicroBatch]):
    """Names the micro-batches of a rank, from an iteration on, without end."""

    def __init__(
        self, stream: SampleStream, *, start: int, rank: int, world_size: int, accumulation: int
    ) -> None:
        self._stream = stream
        self._start = start
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation

    def __iter__(self) -> Iterator[_MicroBatch]:
        iteration = self._start
        shape = (self._accumulation, self._world_size, -1)
        while True:
            epochs, samples = self._stream.indices(iteration)
            # micro-batch m of all ranks together is the same set on any number of ranks
            for e, s in zip(epochs.reshape(shape), samples.reshape(shape), strict=True):
                yield _MicroBatch(e[self._rank], s[self._rank])
            iteration += 1


class TrainLoader:
    """This rank's micro-batches of the global stream.

    Args:
        dataset: map-style: `len(dataset)` and `dataset[index]`. With `get_batch(indices)`, which
            takes (n,) int64 and returns the collated batch, samples are not fetched one by one.
        batch_size: B, over all ranks.
        rank: of this process.
        world_size: number of ranks.
        accumulation: micro-batches in an iteration.
        seed: of the run.
        shuffle: False repeats the data set in its own order.
        workers: loader processes of this rank; 0 loads in the training process.
        seed_samples: seed python, numpy and torch before each sample from (seed, epoch, sample), so
            that augmentation does not depend on rank, worker or resumption. False is cheaper.
        collate: makes a batch of a list of samples; None is torch's default.
        pin_memory: give batches in page-locked memory, for faster copies to a GPU.

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
        self.accumulation = micro_batches(batch_size, ranks=world_size, accumulation=accumulation)
        self.samples_per_forward = batch_size // world_size // self.accumulation
        self.stream = SampleStream(size, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._rank, self._world_size = rank, world_size
        self._fetch = _Fetch(dataset, seed=seed if seed_samples else None, collate=collate)
        self._draws = seed_samples and not hasattr(dataset, "get_batch")
        self._workers, self._pin_memory = workers, pin_memory
        self._iterators: list[Any] = []

    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the endless micro-batches from an iteration on; any start costs the same."""
        plan = _Plan(
            self.stream,
            start=start_iter,
            rank=self._rank,
            world_size=self._world_size,
            accumulation=self.accumulation,
        )
        if self._workers == 0:
            return _load_here(self._fetch, plan, keep_random=self._draws)
        iterator = iter(
            _worker_loader(self._fetch, plan, workers=self._workers, pin_memory=self._pin_memory)
        )
        self._iterators.append(iterator)
        return iterator

    def close(self) -> None:
        """End the loader workers."""
        for iterator in self._iterators:
            iterator._shutdown_workers()
        self._iterators = []


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
        seed_samples: as for `TrainLoader`.
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
        self._plan = [
            _MicroBatch(np.zeros(len(part), np.int64), np.array(part, dtype=np.int64))
            for part in (share[at : at + batch_size] for at in range(0, len(share), batch_size))
        ]
        self._fetch = _Fetch(dataset, seed=seed if seed_samples else None, collate=collate)
        self._draws = seed_samples and not hasattr(dataset, "get_batch")
        self._workers = workers

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of this rank."""
        if self._workers == 0:
            yield from _load_here(self._fetch, self._plan, keep_random=self._draws)
        elif self._plan:
            yield from _worker_loader(self._fetch, self._plan, workers=self._workers)


def length_of(dataset: Any, key: str) -> int:
    """Return the length of a map-style data set.

    Args:
        dataset: any object.
        key: of the configuration, for the error.

    Raises:
        ConfigError: it is empty, or has no length or no items.
    """
    if not hasattr(dataset, "__len__") or not (
        hasattr(dataset, "__getitem__") or hasattr(dataset, "get_batch")
    ):
        raise ConfigError(
            f"{key}: {type(dataset).__name__} has no __len__ and __getitem__; the stream needs a "
            "map-style data set (for an iterable one, give the batches to Trainer yourself)"
        )
    size = len(dataset)
    if size < 1:
        raise ConfigError(f"{key}: {type(dataset).__name__} has length 0; nothing to learn from")
    return size


def _load_here(fetch: _Fetch, plan: Any, *, keep_random: bool) -> Iterator[Any]:
    """Load in this process; what samples draw leaves the process's own generators alone."""
    for item in plan:
        if not keep_random:
            yield fetch[item]
            continue
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            batch = fetch[item]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        yield batch


def _worker_loader(
    fetch: _Fetch, plan: Any, *, workers: int, pin_memory: bool = False
) -> DataLoader[Any]:
    """Return a loader whose workers each load whole micro-batches, in the order of the plan."""
    parent = os.getpid()
    return DataLoader(
        fetch,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=lambda _: _init_worker(parent),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # or it would draw from the training process's generator
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _init_worker(parent: int) -> None:
    """Leave signals to the ranks, die with the rank, use one thread."""
    # a cluster sends its signals to every process; a worker that heeds them takes the rank along
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
    torch.set_num_threads(1)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device, without waiting for the copies.

    Args:
        batch: tensors in dicts, lists, tuples and named tuples; the rest stays as it is.
        device: where to.
    """
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if device.type == "cpu":
        return batch
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(part, device) for part in batch)
    return batch


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor.

    Raises:
        ValueError: there is no tensor in it.
    """
    if isinstance(batch, Tensor) and batch.dim():
        return batch.shape[0]
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(parts, Tensor) or not hasattr(parts, "__iter__"):
        raise ValueError(f"no samples to count in a batch of type {type(batch).__name__}")
    for part in parts:
        try:
            return batch_length(part)
        except ValueError:
            continue
    raise ValueError(f"no samples to count in a batch of type {type(batch).__name__}")
