"""Floats as integers of the same order, so that one integer maximum can carry more than a float."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distrain.history import Floats, Ints


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
    """Map values to int64: float32 in the high half, the rank in the low; a tie goes to rank 0.

    Args:
        values: any shape; rounded to float32, NaN is the largest.
        rank: of this process.
    """
    values32 = np.where(np.isnan(values), np.nan, values + 0.0).astype(np.float32)
    bits: NDArray[np.int32] = values32.view(np.int32)
    keys = np.where(bits < 0, bits ^ np.iinfo(np.int32).max, bits).astype(np.int64)
    return (keys << 32) | (0xFFFFFFFF - rank)


def split_rank(key: int) -> tuple[float, int]:
    """Return the value and the rank of `with_rank`."""
    bits = np.int32(key >> 32)
    bits = bits ^ np.iinfo(np.int32).max if bits < 0 else bits
    return float(np.array(bits, dtype=np.int32).view(np.float32)), 0xFFFFFFFF - (key & 0xFFFFFFFF)
