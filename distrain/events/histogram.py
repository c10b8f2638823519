"""Histograms of tensors: counted on the device, read back when they are written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrain.events.history import Floats


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values in bins of equal width, and statistics of all values."""

    counts: Floats  # (bins,)
    edges: Floats  # (bins + 1,)
    min: float
    max: float
    sum: float
    sum_squares: float
    num: int  # of values


@dataclass(frozen=True)
class PendingHistogram:
    """A histogram on its device."""

    packed: Tensor  # (bins + 5,) counts, low edge, high edge, largest value, sum, sum of squares
    num: int  # of values

    def read(self) -> Histogram:
        """Copy the counts to the host."""
        packed = self.packed.cpu().double().numpy()
        counts, (low, high, largest, total, squares) = packed[:-5], packed[-5:].tolist()
        edges = np.linspace(low, high, len(counts) + 1)
        return Histogram(counts, edges, low, largest, total, squares, self.num)


def count_values(values: Tensor, *, bins: int) -> PendingHistogram:
    """Count the values of a tensor, which is not empty, on its device, without a read-back."""
    flat = values.detach().flatten().to(torch.float32)
    low, high = torch.aminmax(flat)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    # scaled to [0, 1], as torch.histc reads a range given as tensors back to the host
    counts = torch.histc((flat - low) / width, bins=bins, min=0.0, max=1.0)
    sums = torch.stack([low, low + width, high, flat.sum(), flat.square().sum()])
    return PendingHistogram(torch.cat([counts, sums]), flat.numel())
