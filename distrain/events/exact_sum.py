"""Sums of doubles over ranks that do not depend on the order of the additions.

An all-reduce adds the ranks' values of one element in an order that depends on where the element
lies in the vector, so from three ranks on the last bit of a sum changes with the vector's length.
"""

from __future__ import annotations

import numpy as np

from distrain.events.history import Floats

_LOW_BITS = np.int64((1 << 27) - 1)


def split(values: Floats) -> Floats:
    """Return the leading 26 bits of each value, then the other 27, which sum up exactly.

    Sums of either half over W ranks need no rounding, in whatever order, while the ranks' values
    lie within a factor of 2**26 / W of one another. Example: 1 + 2**-40 becomes 1 and 2**-40.

    Args:
        values: (n,) floats.

    Returns:
        (2n,) floats.
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
