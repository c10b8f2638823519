"""Topology and device of this rank, and the default process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distrain.errors import ConfigError
from distrain.process import open_files
from distrain.process.environment import env_int


@dataclass(frozen=True)
class Topology:
    """Position of this process among the ranks.

    Attributes:
        rank: 0 <= rank < world_size.
        world_size: number of ranks.
        local_rank: rank on this node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def topology() -> Topology:
    """Return the topology of the process group; one rank without a group.

    Raises:
        ConfigError: WORLD_SIZE is above 1, but there is no process group.
    """
    if dist.is_available() and dist.is_initialized():
        return Topology(dist.get_rank(), dist.get_world_size(), env_int("LOCAL_RANK"))
    world_size = env_int("WORLD_SIZE", 1)
    if world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE={world_size}: expected a process group; train inside "
            "`with distrain.distributed.process_group():`"
        )
    return Topology()


def local_device() -> torch.device:
    """Return the device of this rank: its GPU where CUDA works, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", env_int("LOCAL_RANK"))
    return torch.device("cpu")


@contextmanager
def process_group(*, timeout_s: float = 600.0) -> Iterator[Topology]:
    """Join the process group that the environment describes; yield the topology; leave at the end.

    NCCL carries CUDA tensors, gloo CPU tensors. With one rank, or without WORLD_SIZE, no group is
    made. `timeout_s` is that of a collective.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = env_int("WORLD_SIZE", 1)
    if world_size == 1:
        yield Topology()
        return
    if os.path.isdir("/proc/self/fd"):
        open_files.check_mesh(world_size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    # Not in a `finally`: after an error other ranks may be dead, and leaving in order would wait
    # for them. The end of this process closes its connections, which the others notice.
    yield topology()
    dist.barrier()  # a rank that leaves first would close connections still in use
    dist.destroy_process_group()


def new_cpu_group() -> dist.ProcessGroup | None:
    """Return a new gloo group of all ranks; None with one rank. A collective.

    The window's all-reduces need a group of their own: two threads in one gloo group hang.
    """
    if topology().world_size == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def default_store() -> Any:
    """Return the key-value store of the default process group; None with one rank."""
    if topology().world_size == 1:
        return None
    return dist.distributed_c10d._get_default_store()
