"""How much memory the ranks use, and what filled it when it did not suffice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distrain.log import logger
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

# scalar -> key of torch.cuda.memory_stats, and what one unit of the scalar is in its unit
_STATS = {
    "memory/allocated_mib": ("allocated_bytes.all.current", 2**20),
    "memory/allocated_peak_mib": ("allocated_bytes.all.peak", 2**20),
    "memory/reserved_mib": ("reserved_bytes.all.current", 2**20),
    "memory/reserved_peak_mib": ("reserved_bytes.all.peak", 2**20),
    "memory/inactive_split_mib": ("inactive_split_bytes.all.current", 2**20),
    "memory/alloc_retries": ("num_alloc_retries", 1),
}
_HINT = (
    "out of memory on rank %d. Smaller shares fit: trainer.accumulation=%d takes the same batch in "
    "more parts; trainer.precision=bf16 halves activations%s. What the allocator held:\n%s"
)
_FRAGMENTED = 0.2  # of what is reserved


class TorchMemoryStats(HookBase):
    """Puts once a window what memory the rank uses that uses most of it.

    - `memory/host_rss_mib`: of the process, without its loader processes;
    - `memory/allocated_mib` and `_peak_mib`: of tensors on the GPU, since the start;
    - `memory/reserved_mib` and `_peak_mib`: what the allocator has taken for them;
    - `memory/inactive_split_mib`: free parts of blocks in use: fragmentation;
    - `memory/alloc_retries`: how often the cache was emptied to go on: each is slow.

    When training ends because the GPU's memory is full, the rank's log gets the allocator's table
    and a hint. Nothing waits for the GPU.
    """

    trainer: Trainer
    only_closes = True

    def before_train(self) -> None:
        """See whether there is a GPU to ask about."""
        self._on_cuda = self.trainer.device.type == "cuda"

    def after_step(self) -> None:
        """Put the numbers when a window ends, and at the end."""
        done, trainer = self.trainer.iter_done, self.trainer
        if done % trainer.window and done != trainer.max_iter:
            return
        values = {"memory/host_rss_mib": host_rss_bytes() / 2**20}
        if self._on_cuda:
            values |= allocator_scalars(torch.cuda.memory_stats(trainer.device))
        trainer.storage.put_scalars(smoothing_hint=False, reduce="max", count=None, **values)

    def after_train(self) -> None:
        """Tell what filled the memory, if it was full."""
        if not isinstance(self.trainer.error, torch.OutOfMemoryError):
            return
        trainer = self.trainer
        hint, table = "", "nothing is known of this device"
        if self._on_cuda:
            stats = torch.cuda.memory_stats(trainer.device)
            table = str(torch.cuda.memory_summary(trainer.device))
            hint = fragmentation_hint(stats)
        logger.error(_HINT, trainer.where.rank, 2 * trainer.accumulation, hint, table)


def allocator_scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of what `torch.cuda.memory_stats` returns; what it lacks is left out."""
    return {name: float(stats[key]) / unit for name, (key, unit) in _STATS.items() if key in stats}


def fragmentation_hint(stats: Mapping[str, Any]) -> str:
    """Return what to try where much is reserved but free in pieces, else nothing."""
    reserved = stats.get("reserved_bytes.all.current", 0)
    pieces = stats.get("inactive_split_bytes.all.current", 0)
    if pieces <= _FRAGMENTED * reserved:
        return ""
    return (
        f"; {pieces / 2**20:.0f} MiB are free, but in pieces: "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )


def host_rss_bytes() -> int:
    """Return how much of this machine's memory this process holds, shared pages too (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
