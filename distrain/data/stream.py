"""The global stream of samples: the same for any number of ranks and of loader workers.

Iteration i trains on the samples at positions [i * B, (i + 1) * B) of an endless sequence of seeded
permutations of the data set, B being the batch over all ranks. A rank takes its part of it, so a
run can start at any iteration, on any number of ranks, and sees the same global batches.

Example: 3 samples in batches of 2, not shuffled: 0 1, 2 0, 1 2, 0 1, ... in the epochs 0 0, 0 1,
1 1, 2 2, ...; shuffled, each epoch has an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distrain.data.collate import MicroBatch
from distrain.data.samplers import SampleOrder
from distrain.errors import ConfigError

_BLOCK = 4096  # positions per call: a numpy call costs as much for 1 as for 1000


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


def train_batches(
    order: SampleOrder,
    *,
    batch_size: int,
    start: int,
    rank: int,
    world_size: int,
    accumulation: int,
) -> Iterator[MicroBatch]:
    """Yield the endless micro-batches of a rank from iteration `start` on."""
    # micro-batch m of all ranks together is the same set on any number of ranks
    shape = (-1, world_size, batch_size // (world_size * accumulation))
    first, num = start * batch_size, max(1, _BLOCK // batch_size) * batch_size
    while True:
        block = (part.reshape(shape)[:, rank] for part in order.at(first, num))
        for epochs, samples in zip(*block, strict=True):
            yield MicroBatch(*order.samples(epochs, samples))
        first += num


def eval_batches(share: range, *, batch_size: int) -> list[MicroBatch]:
    """Return the batches of a rank's part of a data set, in order."""
    batches = []
    for first in range(0, len(share), batch_size):
        part = share[first : first + batch_size]
        samples = np.arange(part.start, part.stop, dtype=np.int64)
        batches.append(MicroBatch(np.zeros_like(samples), samples))
    return batches
