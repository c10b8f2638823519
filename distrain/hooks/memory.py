"""TorchMemoryStats: host and CUDA memory; a report when CUDA memory is exhausted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distrain.log import logger
from distrain.scalar_names import MEMORY
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

# scalar: key of torch.cuda.memory_stats, and the unit of the scalar in that of the key
_STATS = {
    f"{MEMORY}allocated_mib": ("allocated_bytes.all.current", 2**20),
    f"{MEMORY}allocated_peak_mib": ("allocated_bytes.all.peak", 2**20),
    f"{MEMORY}reserved_mib": ("reserved_bytes.all.current", 2**20),
    f"{MEMORY}reserved_peak_mib": ("reserved_bytes.all.peak", 2**20),
    f"{MEMORY}inactive_split_mib": ("inactive_split_bytes.all.current", 2**20),
    f"{MEMORY}alloc_retries": ("num_alloc_retries", 1),
}
_OUT_OF_MEMORY = (
    "out of memory on rank %d. trainer.accumulation=%d takes the same batch in more parts; "
    "trainer.precision=bf16 halves activations%s. Allocator:\n%s"
)
_MAX_INACTIVE_FRACTION = 0.2  # of reserved memory, before a hint on fragmentation


class TorchMemoryStats(HookBase):
    """Puts the memory of the rank that uses most, once per window.

    - `memory/host_rss_mib`: of the process, without its loader processes;
    - `memory/allocated_mib` and `_peak_mib`: tensors on the GPU, since the start;
    - `memory/reserved_mib` and `_peak_mib`: reserved by the allocator;
    - `memory/inactive_split_mib`: free parts of blocks in use (fragmentation);
    - `memory/alloc_retries`: number of times the cache was emptied; each is slow.

    When training ends because the GPU's memory is exhausted, the rank's log gets the allocator's
    table and a hint. Nothing waits for the GPU.
    """

    trainer: Trainer
    only_closes = True

    def before_train(self) -> None:
        self._on_cuda = self.trainer.device.type == "cuda"

    def after_step(self) -> None:
        done, trainer = self.trainer.iter_done, self.trainer
        if done % trainer.window and done != trainer.max_iter:
            return
        values = {f"{MEMORY}host_rss_mib": host_rss_bytes() / 2**20}
        if self._on_cuda:
            stats = torch.cuda.memory_stats(trainer.device)
            for name, (key, unit) in _STATS.items():
                if key in stats:
                    values[name] = float(stats[key]) / unit
        trainer.storage.put_scalars(smoothing_hint=False, reduce="max", **values)

    def after_train(self) -> None:
        trainer = self.trainer
        if not isinstance(trainer.error, torch.OutOfMemoryError):
            return
        hint, table = "", "no statistics of this device"
        if self._on_cuda:
            hint = fragmentation_hint(torch.cuda.memory_stats(trainer.device))
            table = str(torch.cuda.memory_summary(trainer.device))
        logger.error(_OUT_OF_MEMORY, trainer.where.rank, 2 * trainer.accumulation, hint, table)


def fragmentation_hint(stats: Mapping[str, Any]) -> str:
    """Return a hint where much of the reserved memory is free in pieces, else nothing."""
    reserved = stats.get("reserved_bytes.all.current", 0)
    pieces = stats.get("inactive_split_bytes.all.current", 0)
    if pieces <= _MAX_INACTIVE_FRACTION * reserved:
        return ""
    return (
        f"; {pieces / 2**20:.0f} MiB are free, but in pieces: "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )


def host_rss_bytes() -> int:
    """Return the resident memory of this process, shared pages included (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
