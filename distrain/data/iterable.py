"""IterableLoader: training batches of data that is read in order: streams, generators, shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import override

from distrain.checks import wrong
from distrain.data.collate import Collate
from distrain.data.epoch_ends import EpochEnds, has_ranks
from distrain.data.loader import WorkerLoader
from distrain.data.readers import PartBatches, PartReader, SharedReader, Turn, Turns
from distrain.data.source import (
    Source,
    has_shuffle_buffer,
    is_iterable_style,
    is_split_by_library,
    part_of_rank,
)
from distrain.data.stream import micro_batches
from distrain.errors import ConfigError
from distrain.log import logger


class IterableLoader(WorkerLoader):
    """This rank's micro-batches of a data set that is read in order, epoch after epoch.

    Each rank and loader process reads all samples and keeps its own: iteration i takes the samples
    [i * B, (i + 1) * B) of the endless sequence of epochs, on any number of ranks and workers.

    Reading is shared where the data set splits itself over ranks and processes, as Hugging Face
    datasets and webdataset do. Its parts may differ in length: all ranks end an epoch after the
    same forward, and the number of samples left out is logged. It resumes on the same number of
    ranks and workers only.

    A resumed run continues from the data set's own `state_dict` where it has one. Else the samples
    of the epoch before are read again and dropped, with a warning.

    Args:
        dataset: a `torch.utils.data.IterableDataset` or another iterable of the samples of an
            epoch; or a function that returns one, such as a generator function, which may take the
            `epoch`. A method `set_epoch` gets its number.
        batch_size: B, over all ranks.
        rank: of this process.
        world_size: number of ranks.
        accumulation: micro-batches per iteration of a rank; the loader returns one at a time.
        seed: of the run.
        workers: loader processes of this rank; 0 loads in the training process.
        seed_samples: seed python, numpy and torch before each sample from (seed, epoch, number).
        collate: makes a batch of a list of samples; None is torch's default.
        pin_memory: return batches in page-locked memory, for faster copies to a GPU.
        splits_itself: whether the data set reads another part in each rank and loader process;
            None: whether it is one of the two libraries.

    Raises:
        ConfigError: the data set cannot be iterated over again, or the batch does not divide.
    """

    is_seekable = False
    samples_per_forward: int

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        workers: int = 0,
        seed_samples: bool = False,
        collate: Collate | None = None,
        pin_memory: bool = False,
        splits_itself: bool | None = None,
    ) -> None:
        if not is_iterable_style(dataset) or isinstance(dataset, Iterator):
            kind = type(dataset).__name__
            expected = "a data set to iterate over in each epoch"
            fix = "; give the function instead of its result, with _partial_: true"
            raise wrong("data.train", kind, expected + fix * isinstance(dataset, Iterator))
        self.accumulation = micro_batches(batch_size, ranks=world_size, accumulation=accumulation)
        self.samples_per_forward = batch_size // world_size // self.accumulation
        self._splits_itself = (
            is_split_by_library(dataset) if splits_itself is None else splits_itself
        )
        if self._splits_itself:
            dataset = part_of_rank(dataset, rank=rank, world_size=world_size)
        self._dataset, self._collate = dataset, collate
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._seed, self._draws = seed, seed_samples
        self._workers, self._pin_memory = workers, pin_memory
        self._readers = max(1, workers)
        self._start_iter, self._num_since = 0, 0  # micro-batches since iteration `_start_iter`
        self._position: Any = None
        self._ends: EpochEnds | None = None

    @override
    def state_dict(self) -> Any:
        return {"position": self._position, "workers": self._workers}

    @override
    def load_state_dict(self, states: Sequence[Any], *, iteration: int, rank: int) -> None:
        self._start_iter, self._num_since = iteration, 0
        if not self._splits_itself:
            # the last rank reads the last samples of an iteration: all ranks start behind them
            self._position = states[-1]["position"]
            sources = [self._position]
        else:
            for key, now, before in (
                ("ranks", self._world_size, len(states)),
                ("data.workers", self._workers, states[0]["workers"]),
            ):
                if now != before:
                    expected = f"{before}, as the checkpoint has the position in data.train of each"
                    raise wrong(key, now, expected)
            self._position = states[rank]["position"]
            sources = [*self._position["parts"].values()] if self._position else []
        known = [source for source in sources if source is not None and source["own"] is None]
        self._warn_of_reading(sum(source["sample"] for source in known))

    @override
    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the batches after an iteration, as an uninterrupted run gets them."""
        is_behind = start_iter == self._start_iter + self._num_since // self.accumulation
        if not is_behind and self._splits_itself:
            raise ConfigError(
                f"start_iter={start_iter}: expected {self._start_iter}, for which the position in "
                "data.train was loaded"
            )
        if not is_behind:
            self._position = None
        self._start_iter, self._num_since = start_iter, 0
        if not self._splits_itself:
            return self._counted(self._shared(start_iter))
        if has_ranks() and self._ends is None:
            self._ends = EpochEnds()
        return self._counted(self._epochs(self._part_batches(start_iter)))

    def _counted(self, batches: Iterator[tuple[Any, Any]]) -> Iterator[Any]:
        for batch, self._position in batches:
            self._num_since += 1
            yield batch

    def _shared(self, start_iter: int) -> Iterator[tuple[Any, Any]]:
        source, first = Source(self._dataset, seed=self._seed, per_sample=self._draws), 0
        if self._position is not None:
            source.load_state_dict(self._position)
        else:
            first = start_iter * self.accumulation
            self._warn_of_reading(start_iter * self._batch_size)
        reader = SharedReader(
            source,
            size=self.samples_per_forward,
            rank=self._rank,
            world_size=self._world_size,
            collate=self._collate,
            draws=self._draws,
        )
        return self._load(reader, itertools.count(first), start_iter)

    def _part_batches(self, start_iter: int) -> PartBatches:
        position = self._position or {"epoch": 0, "turn": 0, "parts": {}}
        turns = Turns(Turn(position["epoch"], position["turn"]))
        reader = PartReader(
            Source(self._dataset, seed=self._seed, per_sample=self._draws),
            size=self.samples_per_forward,
            rank=self._rank,
            readers=self._readers,
            positions=dict(position["parts"]),
            collate=self._collate,
            draws=self._draws,
        )
        answers = self._load(reader, turns, start_iter)
        return PartBatches(answers, turns, readers=self._readers, position=position)

    def _epochs(self, batches: PartBatches) -> Iterator[tuple[Any, Any]]:
        """Yield the batches of this rank, each with its position, epoch by epoch."""
        is_new = self._position is None
        while True:
            before, found = self._num_since, batches.of_epoch()
            yield from found if self._ends is None else self._ends.together(found)
            if is_new and self._num_since == before:
                expected = f"at least one batch of {self.samples_per_forward} samples per rank"
                raise ConfigError(f"data.train: expected {expected} in an epoch, found none")
            if self._ends is not None:
                batches.left_out += len(self._ends.unused) * self.samples_per_forward
            batches.begin_next()
            self._log_end(batches.epoch - 1, batches.left_out)
            is_new, batches.left_out = True, 0

    def _log_end(self, epoch: int, left_out: int) -> None:
        if self._ends is not None:
            left_out = self._ends.total(left_out)
        if left_out and self._rank == 0:
            logger.info(
                "data.train: epoch %d has ended, on all ranks where it ends on the first; samples "
                "that were read and left out: %d",
                *(epoch, left_out),
            )

    def _warn_of_reading(self, num: int) -> None:
        """Warn, on rank 0, that samples are read again."""
        if num and self._rank == 0:
            name = getattr(getattr(self._dataset, "func", None), "__name__", "")  # of a partial
            name = name or type(self._dataset).__name__
            why = f"{name} has no state_dict() and load_state_dict()"
            if has_shuffle_buffer(self._dataset):
                why = f"the state of {name} lacks the content of its shuffle buffer"
            logger.warning(
                "data.train: %d samples are read again and dropped, to continue where the run "
                "stopped: %s",
                *(num, why),
            )
