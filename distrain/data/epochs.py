"""Repeat an iterable of batches epoch by epoch, from any position on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from distrain.errors import ConfigError
from distrain.log import logger


def repeat(data: Iterable[Any], *, start: int = 0) -> Iterator[Any]:
    """Yield the batches of `data` without end, as an uninterrupted run gets them after `start`.

    Before each epoch, samplers and data sets in `data` with a method `set_epoch` get its number.
    The batches of the first epoch before `start` are loaded and dropped.

    Args:
        data: yields the batches of one epoch each time it is iterated over.
        start: number of batches that the run has had. If `data` has no length, all of them are
            loaded again.

    Raises:
        ConfigError: an epoch has no batch.
    """
    length = _length(data)
    first_epoch, num_dropped = divmod(start, length) if length else (0, start)
    if num_dropped:
        logger.info(
            "resuming within an epoch: %d batches of the data loader are loaded again and dropped; "
            "distrain.data.TrainLoader starts at any iteration at no cost",
            num_dropped,
        )
    for epoch in itertools.count(first_epoch):
        _set_epoch(data, epoch)
        is_empty = True
        for batch in data:
            is_empty = False
            if num_dropped:
                num_dropped -= 1
            else:
                yield batch
        if is_empty:
            raise ConfigError("the data has no batch; expected at least one per epoch")


def _length(data: Iterable[Any]) -> int | None:
    """Return the number of batches in an epoch, None if it is unknown or a guess."""
    # a DataLoader over an IterableDataset reports a length that its workers need not keep to
    if isinstance(getattr(data, "dataset", None), IterableDataset):
        return None
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def _set_epoch(data: Any, epoch: int) -> None:
    batch_sampler = getattr(data, "batch_sampler", None)
    parts = (
        data,
        getattr(data, "dataset", None),
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    for part in {id(part): part for part in parts}.values():
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)
