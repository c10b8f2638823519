"""Source: the samples of an iterable data set, epoch by epoch, from a saved position on."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from distrain.data.epochs import Stateful, set_epoch
from distrain.data.permutation import sample_seeds
from distrain.data.random_states import (
    cpu_random_digest,
    cpu_random_states,
    kept_generators,
    restore_cpu_random_states,
    set_generators,
)
from distrain.errors import add_note


class Source(Iterator[Any]):
    """Samples of one epoch of an iterable data set; `begin_epoch` goes to another.

    Args:
        dataset: yields the samples of an epoch each time it is iterated over, or is a function that
            returns such an iterable, and may take the number of the `epoch`.
        seed: of the run, to set the generators of the process; None: not.
        per_sample: whether they are set before each sample, or before the first two of an epoch.

    Attributes:
        part: number of the part that is read, from 1 on: an order that is drawn with the first
            sample is that of all parts; with `per_sample=False` each draws other numbers after it.
        epoch: number of the epoch.
        sample: number of samples of it that were read.
    """

    def __init__(self, dataset: Any, *, seed: int | None = None, per_sample: bool = True) -> None:
        self._dataset, self._seed, self._per_sample = dataset, seed, per_sample
        self._is_stateful = isinstance(dataset, Stateful) and not has_shuffle_buffer(dataset)
        self._own: Any = None
        self._generators: dict[str, Any] | None = None  # of a position that was loaded
        self._order: str | None = None  # digest of the generators after the first sample
        self._has_drawn = False  # whether a later sample has drawn, as far as known
        self._is_private = False
        self.part = 1
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Go to the first sample of an epoch."""
        self.epoch, self.sample = epoch, 0
        self._iterator: Iterator[Any] | None = None
        self._own = self._generators = self._order = None
        self._has_drawn = False

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._start()
        self._seed_sample(self.sample)
        try:
            sample = next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            name = type(self._dataset).__name__
            add_note(error, f"while reading sample {self.sample} of epoch {self.epoch} of {name}")
            raise
        self.sample += 1
        if self.sample == 1 and self._is_stateful and self._seed is not None:
            digest = cpu_random_digest()
            self._order = None if digest == self._seeded_digest(0) else digest
        return sample

    def state_dict(self, *, reads_ahead: bool = True) -> dict[str, Any]:
        """Return the position after the last sample.

        Args:
            reads_ahead: whether other samples may be read before the position is saved.
        """
        state = {"epoch": self.epoch, "sample": self.sample, "own": self._own}
        if self._is_stateful and self._iterator is not None:
            if self._order is not None and self.sample > 1 and not self._has_drawn:
                last = self.sample - 1 if self._per_sample else self.part
                self._has_drawn = cpu_random_digest() != self._seeded_digest(last)
            own = self._dataset.state_dict()
            # a copy: it may be an object that reading changes, such as a shuffle buffer
            state["own"] = copy.deepcopy(own) if reads_ahead else own
            if not self._per_sample:  # the next numbers follow from all samples before
                state["generators"] = cpu_random_states()
        elif self._generators is not None:
            state["generators"] = self._generators
        return {**state, "order": self._order, "has_drawn": self._has_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; without a state of the data set the samples before are read again."""
        self.begin_epoch(state["epoch"])
        self.sample, self._own = state["sample"], state["own"]
        self._generators = state.get("generators")  # an earlier version saved none, and no order
        self._order, self._has_drawn = state.get("order"), state.get("has_drawn", True)

    def _start(self) -> Iterator[Any]:
        if not self._is_private:
            self._dataset, self._is_private = _private(self._dataset), True
        dataset = self._dataset
        _begin_epoch(dataset, self.epoch)
        self._set_generators(0)
        if self._own is not None and self._is_stateful:
            return self._continued()
        if not hasattr(dataset, "__iter__"):
            takes_epoch = "epoch" in inspect.signature(dataset).parameters
            dataset = dataset(epoch=self.epoch) if takes_epoch else dataset()
        iterator: Iterator[Any] = iter(dataset)
        if self.sample:
            # with the seed of an epoch the next sample's random numbers follow those of all before
            with kept_generators() if self._per_sample else contextlib.nullcontext():
                for number in range(self.sample):
                    self._seed_sample(number)
                    next(iterator, None)
        return iterator

    def _continued(self) -> Iterator[Any]:
        """Return the iterator at the loaded state of the data set."""
        iterator: Iterator[Any] | None = None
        # An order that was drawn with the first sample is drawn again with the next one, unless the
        # state holds it. Known only if the samples themselves draw nothing, assumed after one.
        if self._order is not None and not self._has_drawn:
            self._dataset.load_state_dict(copy.deepcopy(self._own))
            iterator = iter(self._dataset)
            first = [*itertools.islice(iterator, 1)]
            iterator = itertools.chain(first, iterator)
            if cpu_random_digest() != self._order:
                iterator = None
                self._set_generators(0)
        if iterator is None:
            self._dataset.load_state_dict(self._own)
            iterator = iter(self._dataset)
        if not self._per_sample and self._generators is not None:
            restore_cpu_random_states(self._generators)
        return iterator

    def _seed_sample(self, sample: int) -> None:
        if self._per_sample:
            self._set_generators(sample)
        elif sample == 1:  # an order has been drawn with the first one
            self._set_generators(self.part)

    def _set_generators(self, number: int) -> None:
        if self._seed is not None:
            at = np.array([self.epoch], np.int64), np.array([number], np.int64)
            set_generators(int(sample_seeds(*at, seed=self._seed)[0]))

    def _seeded_digest(self, number: int) -> str:
        with kept_generators():
            self._set_generators(number)
            return cpu_random_digest()


class FirstSample:
    """The first sample of an iterable data set, as a map-style one, to compare it over ranks."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return next(Source(self._dataset))


def is_iterable_style(dataset: Any) -> bool:
    """Whether samples are read one after another, rather than by their index."""
    if isinstance(dataset, IterableDataset):
        return True
    has_items = hasattr(dataset, "__getitem__") or hasattr(dataset, "get_batch")
    is_function = isinstance(dataset, functools.partial) or inspect.isroutine(dataset)
    return not has_items and (hasattr(dataset, "__iter__") or is_function)


def is_split_by_library(dataset: Any) -> bool:
    """Whether a data set of a known library reads another part in each rank and loader process."""
    return _is_of("datasets", "IterableDataset", dataset) or _is_webdataset(dataset)


def part_of_rank(dataset: Any, *, rank: int, world_size: int) -> Any:
    """Return the part of a rank; a data set that asks for its rank by itself stays as it is."""
    if not _is_of("datasets", "IterableDataset", dataset):
        return dataset
    library = importlib.import_module("datasets.distributed")
    return library.split_dataset_by_node(dataset, rank, world_size)


def _private(dataset: Any) -> Any:
    """Return a data set whose epoch no other process sets.

    That of Hugging Face datasets is in shared memory, and two processes that add to it at once
    arrive at another epoch. A new object has an epoch of its own.
    """
    return part_of_rank(dataset, rank=0, world_size=1)


def has_shuffle_buffer(dataset: Any) -> bool:
    """Whether it has a shuffle buffer of Hugging Face datasets, which their state lacks."""
    parts = [getattr(dataset, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if "BufferShuffled" in type(part).__name__:
            return True
        parts += [getattr(part, "ex_iterable", None)] if hasattr(part, "ex_iterable") else []
        parts += getattr(part, "ex_iterables", [])
    return False


def _is_of(module: str, name: str, dataset: Any) -> bool:
    found = sys.modules.get(module)  # imported, if the data set is an object of it
    return found is not None and isinstance(dataset, getattr(found, name, ()))


def _is_webdataset(dataset: Any) -> bool:
    return _is_of("webdataset", "DataPipeline", dataset)


def _begin_epoch(dataset: Any, epoch: int) -> None:
    set_epoch(dataset, epoch)
    if _is_webdataset(dataset):  # its stages count their epochs themselves, in each process
        for stage in dataset.pipeline:
            if isinstance(getattr(stage, "epoch", None), int):
                stage.epoch = epoch - 1
