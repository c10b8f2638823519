"""Length of an epoch in iterations."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from distrain.data.epoch_ends import has_ranks, lengths_of_ranks
from distrain.data.epochs import num_batches
from distrain.data.loader import Loader


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
