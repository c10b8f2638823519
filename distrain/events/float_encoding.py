"""Encodings of float64 for all-reduce: integers of the same order, halves that sum up exactly."""

from __future__ import annotations

import math

import numpy as np

from distrain.events.history import Floats, Ints

_LARGEST = np.int64(np.iinfo(np.int64).max)
_RANK_BITS = np.int64(2**20 - 1)
_LOW_BITS = np.int64((1 << 27) - 1)


def ordered(values: Floats) -> Ints:
    """Encode float64 as int64 of the same order; NaN is the largest.

    Example: `ordered([-1.0, 0.0, 1.0])` rises, and `unordered` returns the floats.
    """
    values = np.where(np.isnan(values), np.nan, values + 0.0)  # one NaN, one zero
    bits: Ints = np.ascontiguousarray(values).view(np.int64)
    # the bits of a positive float rise with it; those of a negative one fall, so all but its sign
    # bit are flipped
    return np.where(bits < 0, bits ^ _LARGEST, bits)


def unordered(keys: Ints) -> Floats:
    """Decode `ordered`."""
    bits: Ints = np.where(keys < 0, keys ^ _LARGEST, keys)
    return bits.view(np.float64)


def with_rank(values: Floats, rank: int) -> Ints:
    """Encode values and their negatives as int64 of the same order, with the rank in the low bits.

    Args:
        values: (n,); 32 bits of the mantissa are kept, NaN is the largest.
        rank: of this process, below 2**20; of equal values that of the lowest rank is the largest.

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
    """Decode `with_rank` into value and rank."""
    bits = key & ~_RANK_BITS if key >= 0 else key | _RANK_BITS  # zeros, once the order is undone
    value = unordered(np.array([bits]))[0]
    return float(value), int(_RANK_BITS - (key & _RANK_BITS))


# An all-reduce adds the ranks' values of an element in an order that depends on its position, so
# from three ranks on the last bit of a sum changes with the length of the buffer.
def split(values: Floats) -> Floats:
    """Split (n,) values into (2n,): their leading 26 bits, then the other 27, which sum up exactly.

    Sums of either half over W ranks need no rounding, in any order, while the ranks' values are
    within a factor of 2**26 / W of one another. Example: 1 + 2**-40 becomes 1 and 2**-40.
    """
    high = (values.view(np.int64) & ~_LOW_BITS).view(np.float64)
    is_finite = np.isfinite(values)
    high = np.where(is_finite, high, values)
    low = np.subtract(values, high, out=np.zeros_like(values), where=is_finite)
    return np.concatenate([high, low])


def join(sums: Floats) -> Floats:
    """Return the (n,) sums of values whose `split` halves were summed, rounded once."""
    high, low = sums.reshape(2, -1)
    joined: Floats = high + low
    return joined
