"""Histograms of tensors: counted on their device, read back when they are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrain.events.history import Floats


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in bins of equal width.

    Attributes:
        counts: (bins,) how many values fell into each bin.
        edges: (bins + 1,) the borders of the bins, rising.
        min: the smallest value. max: the largest. sum: of all values.
        sum_squares: of all values. num: how many values.
    """

    counts: Floats
    edges: Floats
    min: float
    max: float
    sum: float
    sum_squares: float
    num: int


@dataclass(frozen=True)
class PendingHistogram:
    """A histogram still on its device.

    Attributes:
        packed: (bins + 5,) counts, then low edge, high edge, largest value, sum, sum of squares.
        num: how many values were counted.
    """

    packed: Tensor
    num: int

    def read(self) -> Histogram:
        """Read it back from the device."""
        packed = self.packed.cpu().double().numpy()
        counts, (low, high, largest, total, squares) = packed[:-5], packed[-5:].tolist()
        edges = np.linspace(low, high, len(counts) + 1)
        return Histogram(counts, edges, low, largest, total, squares, self.num)


def count_values(values: Tensor, *, bins: int) -> PendingHistogram:
    """Count the values of a tensor on its device, without reading anything back.

    Args:
        values: any shape, floating or integer, not empty.
        bins: how many bins of equal width between the smallest and the largest value.
    """
    flat = values.detach().flatten().to(torch.float32)
    low, high = torch.aminmax(flat)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    # torch.histc would read a range given as tensors back to the host; scaled to [0, 1] it need not
    counts = torch.histc((flat - low) / width, bins=bins, min=0.0, max=1.0)
    sums = torch.stack([low, low + width, high, flat.sum(), flat.square().sum()])
    return PendingHistogram(torch.cat([counts, sums]), flat.numel())
