"""Readers of iterable data in a rank or a loader process: micro-batches with their positions.

`PartBatches` joins those of a rank, epoch by epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info
from torch.utils.data._utils import worker

from distrain.data.collate import BatchReader, Collate
from distrain.data.random_states import Generators
from distrain.data.ring import collate_samples
from distrain.data.source import Source
from distrain.errors import ConfigError

_END: Any = object()


class SharedReader(BatchReader):
    """Reads all samples, as all other readers do, and keeps those of its own micro-batches.

    Forward f of rank r of W takes the n samples from (f * W + r) * n on, of the endless sequence of
    epochs after the source's position: on any number of ranks and processes the same sequence.
    An order that is drawn is the same, too: where samples are not seeded, reading has generators
    apart from those of the process, which differ.

    Args:
        source: of all samples; seeded before each sample, or before each epoch.
        size: n, samples per micro-batch.
        rank: r.
        world_size: W.
        collate: makes a batch of a list of samples; None is torch's default.
        draws: whether reading sets the random generators of the process.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        rank: int,
        world_size: int,
        collate: Collate | None,
        draws: bool,
    ) -> None:
        self._source, self._size = source, size
        self._rank, self._world_size = rank, world_size
        self._collate = collate or collate_samples
        self._next = 0  # position of the next sample
        self._generators = None if draws else Generators()
        self.draws = draws

    def __getitem__(self, forward: int) -> tuple[Any, Any]:
        """Return the batch of a forward, and the position after it if it is that of all ranks."""
        first = (forward * self._world_size + self._rank) * self._size
        # not the information of the process: a data set that sees it would read a part only
        generators = self._generators.exchanged() if self._generators else contextlib.nullcontext()
        reads_ahead = get_worker_info() is not None
        with _worker_info(None), generators:
            while self._next < first:
                self._read()
            samples = [self._read() for _ in range(self._size)]
            is_last = self._rank == self._world_size - 1
            position = self._source.state_dict(reads_ahead=reads_ahead) if is_last else None
        return self._collate(samples), position

    def _read(self) -> Any:
        for _ in range(2):
            sample = next(self._source, _END)
            if sample is not _END:
                self._next += 1
                return sample
            self._source.begin_epoch(self._source.epoch + 1)
        raise ConfigError("data.train: an epoch has no sample; expected at least one")


class Turn(NamedTuple):
    """A request for a batch: an epoch, and how many it follows in the epoch."""

    epoch: int
    number: int


class Turns(Iterator[Turn]):
    """Endless requests; `begin_epoch` goes to another epoch."""

    def __init__(self, first: Turn) -> None:
        self.next = first

    def __next__(self) -> Turn:
        turn = self.next
        self.next = Turn(turn.epoch, turn.number + 1)
        return turn

    def begin_epoch(self, epoch: int) -> None:
        """Go to the first turn of an epoch."""
        self.next = Turn(epoch, 0)


class Part(NamedTuple):
    """Answer to a turn: a batch, or no batch and the number of samples too few for one.

    Attributes:
        epoch: of the turn.
        reader: number of the reader among those of the rank.
        size: number of samples.
        batch: None at the end of the reader's part.
        position: of the reader's source, after the batch.
    """

    epoch: int
    reader: int
    size: int
    batch: Any = None
    position: Any = None


class PartReader(BatchReader):
    """Reads the part of a data set that belongs to this rank and loader process.

    The turns of an epoch go round the readers of a rank. The number of a reader follows from its
    first turn, and not from its process, so that a resumed run goes on in the same order. Where
    samples are not seeded, reading has generators apart from those of the process: an order that is
    drawn is the same for all parts, and when samples are read again.

    Args:
        source: a data set that reads the part of its rank and process; seeded before each sample,
            or before each epoch.
        size: samples per micro-batch.
        rank: of this process.
        readers: their number per rank.
        positions: of readers, by their number, at which their first epoch starts; None: its end.
        collate: makes a batch of a list of samples; None is torch's default.
        draws: whether reading sets the random generators of the process.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        rank: int,
        readers: int,
        positions: dict[int, Any],
        collate: Collate | None,
        draws: bool,
    ) -> None:
        self._source, self._size = source, size
        self._rank, self._readers = rank, readers
        self._positions = positions
        self._collate = collate or collate_samples
        self._epoch: int | None = None
        self._has_ended = False
        self._generators = None if draws else Generators()
        self.draws = draws

    def __getitem__(self, turn: Turn) -> Part:
        """Return the next batch of the turn's epoch."""
        reader = turn.number % self._readers
        generators = self._generators.exchanged() if self._generators else contextlib.nullcontext()
        number = reader if self._readers > 1 or get_worker_info() else None
        with _worker_info(number), generators:
            if turn.epoch != self._epoch:
                self._begin(turn.epoch, reader)
            if self._has_ended:
                return Part(turn.epoch, reader, 0)
            samples = [*islice(self._source, self._size)]
            if len(samples) < self._size:
                self._has_ended = True
                return Part(turn.epoch, reader, len(samples))
            position = self._source.state_dict()
        return Part(turn.epoch, reader, self._size, self._collate(samples), position)

    def _begin(self, epoch: int, reader: int) -> None:
        self._epoch, self._has_ended = epoch, False
        self._source.part = 1 + self._rank * self._readers + reader
        self._source.begin_epoch(epoch)
        if reader in self._positions:
            position = self._positions[reader]
            self._has_ended = position is None
            if position is not None:
                self._source.load_state_dict(position)
        self._positions = {}


class PartBatches:
    """Batches of the readers of a rank, in turn; a reader whose part has ended is left out.

    Args:
        answers: of the readers, in the order of the turns.
        turns: requests to the readers.
        readers: their number.
        position: that after a batch, which `of_epoch` has yielded with it.

    Attributes:
        epoch: number of the epoch.
        left_out: samples of the epoch that were read, but are in no batch.
    """

    def __init__(
        self, answers: Iterator[Part], turns: Turns, *, readers: int, position: dict[str, Any]
    ) -> None:
        self._answers, self._turns, self._readers = answers, turns, readers
        self.epoch, self._turn = position["epoch"], position["turn"]
        self._parts = dict(position["parts"])  # reader -> its position; None at its end
        self._held: list[Part] = []
        self.left_out = 0

    def of_epoch(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield the remaining batches of the epoch, each with the position after it."""
        while list(self._parts.values()).count(None) < self._readers:
            part = self._held.pop() if self._held else next(self._answers)
            self._turn += 1
            self._parts[part.reader] = part.position
            if part.batch is None:
                self.left_out += part.size
            else:
                parts = dict(self._parts)
                yield part.batch, {"epoch": self.epoch, "turn": self._turn, "parts": parts}

    def begin_next(self) -> None:
        """Go to the next epoch; batches of this one that readers have in work are left out."""
        self._turns.begin_epoch(self.epoch + 1)
        while not self._held:
            part = next(self._answers)
            if part.epoch > self.epoch:
                self._held = [part]
            else:
                self.left_out += part.size
        self.epoch, self._turn, self._parts = self.epoch + 1, 0, {}


@contextlib.contextmanager
def _worker_info(number: int | None) -> Iterator[None]:
    """Let `get_worker_info` return another number of this process, or None, inside `with`."""
    info = get_worker_info()
    if info is None:
        yield
        return
    other = None
    if number is not None:
        other = type(info)(
            id=number, num_workers=info.num_workers, seed=info.seed, dataset=info.dataset
        )
    worker._worker_info = other
    try:
        yield
    finally:
        worker._worker_info = info
