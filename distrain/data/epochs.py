"""Repeat an iterable of batches epoch by epoch, from any position on; length of an epoch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset
from typing_extensions import override

from distrain.data.epoch_ends import EpochEnds, has_ranks, lengths_of_ranks
from distrain.data.loader import Loader
from distrain.data.random_states import (
    cpu_random_states,
    kept_generators,
    restore_cpu_random_states,
)
from distrain.errors import ConfigError
from distrain.log import logger


@runtime_checkable
class Stateful(Protocol):
    """Data that knows its position, as torchdata's StatefulDataLoader."""

    def state_dict(self) -> Any:
        """Return the position after the last item."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Begin the next iteration at a position."""


class EpochLoader(Loader):
    """Endless batches of an iterable, such as a DataLoader, epoch after epoch.

    Before each epoch, samplers and data sets in the data with a method `set_epoch` get its number.
    All ranks end an epoch after the same batch: the last one of the rank that has the fewest.

    A resumed run continues where it stopped: from the data's own state where it has one; else the
    batches of its epoch before are loaded again and dropped. Their order is that of the first time
    where it comes from `set_epoch`, from the generators of python, numpy and torch, or from the
    `generator` of a DataLoader or sampler: their states at the begin of the epoch are saved.

    Args:
        data: yields the batches of one epoch of this rank each time it is iterated over.
        accumulation: batches per iteration.

    Raises:
        ConfigError: an epoch has no batch; or the data has its own state, and it was saved on
            another number of ranks.
    """

    is_seekable = False

    def __init__(self, data: Iterable[Any], *, accumulation: int = 1) -> None:
        self._data = data
        self._accumulation = accumulation
        self._start_iter, self._num_since = 0, 0  # batches since iteration `_start_iter`
        self._epoch = self._batch = 0  # position: in an epoch, after a number of its batches
        self._generator: Any = None  # states of the CPU generators, when the epoch began
        self._own_generators: Any = None  # states of the data's, at a position that was loaded
        self._own: Any = None  # state of the data; None: ask it
        self._ends: EpochEnds | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        own = self._own
        if own is None and self._num_since and isinstance(self._data, Stateful):
            own = self._data.state_dict()
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "generator": self._generator,
            "own": own,
            "own_generators": [each.get_state() for each in _generators(self._data)],
        }

    @override
    def load_state_dict(self, states: Sequence[Any], *, iteration: int, rank: int) -> None:
        world_size = dist.get_world_size() if has_ranks() else 1
        if len(states) != world_size:
            if states[0]["own"] is not None:
                raise ConfigError(
                    f"ranks={world_size}: expected {len(states)}, as the checkpoint has the "
                    f"position of each rank in {type(self._data).__name__}"
                )
            if rank == 0 and states[0]["batch"]:
                logger.warning(
                    "ranks=%d: the checkpoint was saved on %d, so the rest of epoch %d is not that "
                    "of the first time: samples may come twice in it, or never; "
                    "distrain.data.TrainLoader has the same batches on any number of ranks",
                    *(world_size, len(states), states[0]["epoch"]),
                )
            return  # `batches` starts by the number of batches
        state = states[rank]
        self._start_iter, self._num_since = iteration, 0
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._generator, self._own = state["generator"], state["own"]
        self._own_generators = state.get("own_generators")  # an earlier version saved none

    @override
    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the batches after an iteration, as an uninterrupted run gets them."""
        length = num_batches(self._data)
        if has_ranks() and not isinstance(self._data, Iterator):
            lengths = lengths_of_ranks(length)
            if None in lengths:
                length, self._ends = None, self._ends or EpochEnds()
            else:
                known = [each for each in lengths if each is not None]
                length = min(known)
                if length < max(known) and dist.get_rank() == 0:
                    logger.info(
                        "epochs end after %d batches per rank, as on rank %d; the other ranks "
                        "leave out %d batches per epoch",
                        *(length, known.index(length), sum(known) - length * len(known)),
                    )
        if start_iter != self._start_iter + self._num_since // self._accumulation:
            start = start_iter * self._accumulation
            self._epoch, self._batch = divmod(start, length) if length else (0, start)
            self._generator = self._own = self._own_generators = None
        self._start_iter, self._num_since = start_iter, 0
        return self._endless(length)

    def _endless(self, length: int | None) -> Iterator[Any]:
        if self._own is None and self._batch == length:  # nothing to load again
            self._epoch, self._batch, self._generator = self._epoch + 1, 0, None
            _restore(self._data, self._own_generators)
        while True:
            batches = self._rest_of_epoch(length)
            if self._ends is not None:
                batches = self._ends.together(batches)
            for batch, self._own in batches:
                self._batch += 1
                self._num_since += 1
                yield batch
            if self._batch == 0 and isinstance(self._data, Iterator):  # one that has ended
                raise ConfigError(
                    f"the data, a {type(self._data).__name__}, gives its batches once; expected a "
                    "list or another object to iterate over in each epoch"
                )
            if self._batch == 0:
                raise ConfigError("the data has no batch; expected at least one per epoch")
            if self._ends is not None and (unused := self._ends.total(len(self._ends.unused))):
                logger.info(
                    "epoch %d ended after %d batches per rank, when a rank had no more: %d of the "
                    "others, which they had loaded, were left out",
                    *(self._epoch, self._batch, unused),
                )
            self._epoch, self._batch, self._generator, self._own = self._epoch + 1, 0, None, None

    def _rest_of_epoch(self, length: int | None) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of the epoch after the position, with the data's state after each.

        The state is None where it is known without: no batch is read ahead.
        """
        self._start_persistent_workers()
        set_epoch(self._data, self._epoch)
        iterator = self._start() if self._batch else None
        if iterator is None:
            own = [each.get_state() for each in _generators(self._data)]
            self._generator = {**cpu_random_states(), "own_generators": own}
            iterator = iter(self._data)
        has_state = self._ends is not None and isinstance(self._data, Stateful)
        left = None if length is None else length - self._batch
        for batch in itertools.islice(iterator, left):
            state = self._data.state_dict() if has_state else None  # type: ignore[attr-defined]
            # a copy: it may be an object that reading changes
            yield batch, copy.deepcopy(state)

    def _start_persistent_workers(self) -> None:
        """Start them in a resumed run as the first epoch has: torch draws their seed only then."""
        is_first = getattr(self._data, "_iterator", self._data) is None  # of torch's DataLoader
        if self._epoch and is_first and getattr(self._data, "persistent_workers", False):
            states = [each.get_state() for each in _generators(self._data)]
            set_epoch(self._data, 0)
            with kept_generators():
                iter(self._data)
            _restore(self._data, states)

    def _start(self) -> Iterator[Any]:
        """Return the iterator of the epoch at the position; the CPU generators stay as they are."""
        with kept_generators():
            if self._own is not None and isinstance(self._data, Stateful):
                if isinstance(self._generator, dict):
                    # a sampler without a state draws the order of the epoch again
                    restore_cpu_random_states(self._generator)
                    _restore(self._data, self._generator.get("own_generators"))
                self._data.load_state_dict(self._own)
                iterator = iter(self._data)
                _restore(self._data, self._own_generators)
                return iterator
            logger.warning(
                "resuming within an epoch: the first %d batches of epoch %d are loaded again and "
                "dropped; distrain.data.TrainLoader starts at any iteration at no cost",
                *(self._batch, self._epoch),
            )
            if isinstance(self._generator, Tensor):  # an earlier version saved torch's alone
                torch.set_rng_state(self._generator)
            elif self._generator is not None:
                restore_cpu_random_states(self._generator)
                _restore(self._data, self._generator.get("own_generators"))
            while True:
                iterator = iter(self._data)
                dropped = sum(1 for _ in itertools.islice(iterator, self._batch))
                if dropped in (0, self._batch):
                    return iterator
                # only without a saved state: the position was counted from the very first batch
                self._epoch, self._batch = self._epoch + 1, self._batch - dropped
                set_epoch(self._data, self._epoch)


def num_batches(data: Iterable[Any]) -> int | None:
    """Return the number of batches in an epoch, None if it is unknown or a guess."""
    # a DataLoader over an IterableDataset reports a length that its workers need not keep to
    if isinstance(getattr(data, "dataset", None), IterableDataset):
        return None
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def iters_per_epoch(data: Any, *, forwards: int, accumulation: int) -> Fraction | None:
    """Return the exact number of iterations per pass over the data; None if it is unknown.

    A collective if the data is no loader of distrain: an epoch is that of the rank with the fewest
    batches. Example: 100 samples in batches of 40 over all ranks are 5/2.

    Args:
        data: a loader, or an iterable of a rank's batches, such as torch's DataLoader.
        forwards: per iteration, of all ranks together.
        accumulation: forwards per iteration of one rank.
    """
    if isinstance(data, Loader):
        if data.iters_per_epoch is not None:
            return Fraction(data.iters_per_epoch)
        if not data.num_samples or not data.samples_per_forward:
            return None
        return Fraction(data.num_samples, data.samples_per_forward * forwards)
    length = num_batches(data)
    lengths = lengths_of_ranks(length) if has_ranks() else [length]
    return Fraction(min(n or 0 for n in lengths), accumulation) or None


def set_epoch(data: Any, epoch: int) -> None:
    """Pass the number of an epoch to `set_epoch` of the data, its data set and its samplers."""
    for part in _parts(data):
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


def _parts(data: Any) -> list[Any]:
    """Return the data, its data set and its samplers, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = (
        data,
        getattr(data, "dataset", None),
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return [*{id(part): part for part in parts}.values()]


def _generators(data: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, each once."""
    found = [getattr(part, "generator", None) for part in _parts(data)]
    return [*{id(g): g for g in found if isinstance(g, torch.Generator)}.values()]


def _restore(data: Any, states: Sequence[Tensor] | None) -> None:
    for generator, state in zip(_generators(data), states or (), strict=False):
        generator.set_state(state)
