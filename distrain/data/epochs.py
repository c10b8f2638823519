"""Repeat an iterable of batches, epoch after epoch, from any position on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from distrain.errors import ConfigError
from distrain.log import logger


def repeat(data: Iterable[Any], *, start: int = 0) -> Iterator[Any]:
    """Yield the batches of `data` over and over, as an uninterrupted run sees them after `start`.

    Every sampler and data set in `data` that has a `set_epoch` gets the epoch before it begins.
    The batches of the first epoch that come before `start` are loaded and dropped.

    Args:
        data: gives the batches of one epoch each time it is iterated over.
        start: number of batches that the run has taken before. Where `data` has no length, all of
            them are loaded again to get there.

    Raises:
        ConfigError: there is no batch in an epoch.
    """
    length = _length(data)
    first_epoch, num_dropped = divmod(start, length) if length else (0, start)
    if num_dropped:
        logger.info(
            "resuming within an epoch: %d batches of the data loader are loaded again and dropped; "
            "distrain.data.loader.TrainLoader starts anywhere at no cost",
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
            raise ConfigError("the data has no batch; training needs at least one")


def _length(data: Iterable[Any]) -> int | None:
    """Return the number of batches in an epoch, None where it is unknown or only a guess."""
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
