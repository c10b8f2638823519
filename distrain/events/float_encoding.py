"""Floats as integers of the same order, so that one integer maximum can carry more than a float."""

from __future__ import annotations

import math

import numpy as np

from distrain.events.history import Floats, Ints

_LARGEST = np.int64(np.iinfo(np.int64).max)
_RANK_BITS = np.int64(2**20 - 1)


def ordered(values: Floats) -> Ints:
    """Map float64 to int64 so that order is kept and NaN is the largest.

    Bits of a positive float rise with it; those of a negative one fall, so all but its sign bit
    are flipped. `ordered([-1.0, 0.0, 1.0])` rises, and `unordered` gives the floats back.
    """
    values = np.where(np.isnan(values), np.nan, values + 0.0)  # one NaN, one zero
    bits: Ints = np.ascontiguousarray(values).view(np.int64)
    return np.where(bits < 0, bits ^ np.iinfo(np.int64).max, bits)


def unordered(keys: Ints) -> Floats:
    """Return the floats that `ordered` was given."""
    bits: Ints = np.where(keys < 0, keys ^ np.iinfo(np.int64).max, keys)
    return bits.view(np.float64)


def with_rank(values: Floats, rank: int) -> Ints:
    """Map values and their negatives to int64 of the same order whose low bits tell the rank.

    Args:
        values: (n,); kept to 32 bits of their mantissa, NaN is larger than all.
        rank: of this process, below 2**20; of equal values rank 0's is the largest.

    Returns:
        (2, n): of the values, of the negatives.
    """
    both = np.empty((2, len(values)))
    np.add(values, 0.0, out=both[0])  # one zero
    np.subtract(0.0, values, out=both[1])
    if math.isnan(both[0].sum()):
        both[np.isnan(both)] = np.nan  # one NaN
    keys: Ints = both.view(np.int64)
    keys ^= (keys >> 63) & _LARGEST
    keys &= ~_RANK_BITS
    keys |= _RANK_BITS - rank
    return keys


def split_rank(key: np.int64) -> tuple[float, int]:
    """Return the value and the rank of `with_rank`."""
    bits = key & ~_RANK_BITS if key >= 0 else key | _RANK_BITS  # zeros, once the order is undone
    value = unordered(np.array([bits]))[0]
    return float(value), int(_RANK_BITS - (key & _RANK_BITS))
