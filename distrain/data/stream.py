"""The global stream of samples: the same for any number of ranks and of loader workers.

Iteration i trains on the samples at positions [i * B, (i + 1) * B) of an endless sequence of seeded
permutations of the data set, B being the batch over all ranks. A rank takes its part of it, so a
run can start at any iteration, on any number of ranks, and sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from distrain.checks import whole
from distrain.data.collate import MicroBatch
from distrain.data.permutation import Ints
from distrain.data.samplers import SampleOrder, Shuffled
from distrain.errors import ConfigError

_BLOCK = 4096  # positions per call: a numpy call costs as much for 1 as for 1000


class SampleStream:
    """The endless sequence of samples that all ranks share.

    Example: 3 samples in batches of 2, not shuffled: 0 1, 2 0, 1 2, 0 1, ... in the epochs 0 0,
    0 1, 1 1, 2 2, ...; shuffled, each epoch has an order of its own.

    Args:
        size: of the data set.
        batch_size: B, over all ranks.
        seed: of the run.
        shuffle: False repeats the data set in its own order.
        sampler: another order of samples; `shuffle` does not count then.

    Raises:
        ConfigError: a number is too small.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        sampler: SampleOrder | None = None,
    ) -> None:
        self.size = whole("length of the data set", size, least=1)
        self.batch_size = whole("data.batch_size", batch_size, least=1)
        whole("seed", seed, least=0)
        self._order = sampler or Shuffled(size, seed=seed, shuffle=shuffle)

    def indices(self, iteration: int) -> tuple[Ints, Ints]:
        """Return the (B,) epochs and (B,) samples of an iteration's batch, in O(B) anywhere."""
        return self.at(iteration * self.batch_size, self.batch_size)

    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        """Return the (num,) epochs and (num,) samples from a position of the sequence on."""
        return self._order.at(first, num)

    def samples(self, epochs: Ints, indices: Ints) -> tuple[Ints, Ints]:
        """Return the epochs and samples of one forward, see `SampleOrder.samples`."""
        return self._order.samples(epochs, indices)


def micro_batches(
    batch_size: int, *, ranks: int, accumulation: int = 1, largest: int | None = None
) -> int:
    """Return the number of forwards per step in which a rank takes its part of the batch.

    Without `largest` it is `accumulation`, checked; else the least number, not under
    `accumulation`, of forwards with at most `largest` samples. Example: 48 samples on 4 ranks in
    forwards of 12; on 2 ranks with `largest=12` in 2 forwards each.

    Args:
        batch_size: B, over all ranks.
        ranks: number of ranks.
        accumulation: forwards per step as configured.
        largest: most samples per forward, those of the run that continues on other ranks; None
            sets no limit.

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
        f"data.batch_size={batch_size}: expected a multiple of {ranks} ranks times "
        f"trainer.accumulation={accumulation}; the nearest: {nearest}"
    )


class TrainSampler(Sampler[MicroBatch]):
    """Endless micro-batches of one rank, from an iteration on."""

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
                yield MicroBatch(*self._stream.samples(epochs, samples))
            first += num


def eval_batches(share: range, *, batch_size: int) -> list[MicroBatch]:
    """Return the batches of a rank's part of a data set, in order."""
    batches = []
    for first in range(0, len(share), batch_size):
        part = share[first : first + batch_size]
        samples = np.arange(part.start, part.stop, dtype=np.int64)
        batches.append(MicroBatch(np.zeros_like(samples), samples))
    return batches
