"""A loader: windows of token files, read when they are needed.

data: {train: null, loader: {_target_: examples.token_shards.TokenShards, files: f, context: 1024}}
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distrain.data import Loader


class TokenShards(Loader):
    """Batches (n, context + 1) of int64 tokens from `*.npy` files of integers, in order, endlessly.

    The windows of all ranks together are the same for any number of ranks, and an iteration's
    windows follow from its number: a resumed run sees those of an uninterrupted one.

    Args:
        files: folder of the files, one dimension each.
        context: tokens per window, without the last target.
        batch_size, rank, world_size, accumulation: given by distrain.
    """

    def __init__(
        self,
        *,
        files: str,
        context: int,
        batch_size: int,
        rank: int,
        world_size: int,
        accumulation: int,
    ) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in sorted(Path(files).glob("*.npy"))]
        self._context = context
        self._ends = np.cumsum([(len(shard) - 1) // context for shard in self._shards])
        if not self._shards or self._ends[-1] < 1:
            raise ValueError(f"files={files}: expected *.npy files of more than {context} tokens")
        self.num_samples = int(self._ends[-1])
        self.samples_per_forward = batch_size // (world_size * accumulation)
        self._rank, self._ranks, self._accumulation = rank, world_size, accumulation

    def batches(self, start_iter: int) -> Iterator[Tensor]:
        """Yield the windows of this rank; forward f takes those from f * n * ranks on."""
        n = self.samples_per_forward
        for forward in itertools.count(start_iter * self._accumulation):
            first = (forward * self._ranks + self._rank) * n
            yield torch.stack([self._window(w % self.num_samples) for w in range(first, first + n)])

    def _window(self, number: int) -> Tensor:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        first = (number - (int(self._ends[shard - 1]) if shard else 0)) * self._context
        part = self._shards[shard][first : first + self._context + 1]
        return torch.from_numpy(part.astype(np.int64))
