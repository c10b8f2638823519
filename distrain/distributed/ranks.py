"""The process group: who we are, on which device, with which seed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distrain.distributed.serialization import decode, encode
from distrain.errors import ConfigError
from distrain.process import open_files as openfiles
from distrain.process.environment import env_int


@dataclass(frozen=True)
class Topology:
    """Where this process stands among the ranks.

    Attributes:
        rank: of this process, 0 <= rank < world_size.
        world_size: how many ranks there are.
        local_rank: of this process on its node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def topology() -> Topology:
    """Return where this process stands: from the process group, or alone without one.

    Raises:
        ConfigError: a launcher announced several ranks, but no process group was made.
    """
    if dist.is_available() and dist.is_initialized():
        return Topology(dist.get_rank(), dist.get_world_size(), env_int("LOCAL_RANK"))
    announced = env_int("WORLD_SIZE", 1)
    if announced > 1:
        raise ConfigError(
            f"WORLD_SIZE={announced}, but there is no process group; train inside "
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
    """Join the ranks that the environment names, and leave them at the end.

    NCCL carries CUDA tensors and gloo those of the CPU. Without WORLD_SIZE, or with one rank, there
    is nothing to join.

    Args:
        timeout_s: how long a collective waits for a rank that does not come.

    Yields:
        where this process stands.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if env_int("WORLD_SIZE", 1) == 1:
        yield Topology()
        return
    if os.path.isdir("/proc/self/fd"):
        openfiles.check_mesh(env_int("WORLD_SIZE", 1))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield topology()
    except BaseException:
        # Others may be gone: leaving the group in order would wait for them. The end of the
        # process closes its connections, and that is what tells them.
        raise
    else:
        dist.barrier()  # nobody closes a connection that another still reads
        dist.destroy_process_group()


def new_cpu_group() -> dist.ProcessGroup | None:
    """Return a process group of all ranks for CPU tensors; None with one rank. A collective.

    The window's collectives have a group of their own: two threads that use one gloo group hang.
    """
    if topology().world_size == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def default_store() -> Any:
    """Return the key-value store that the ranks met in; None with one rank."""
    if topology().world_size == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def seed_everything(seed: int, *, rank: int) -> None:
    """Seed python, numpy and torch (all devices): differently on each rank.

    Args:
        seed: of the run.
        rank: of this process.
    """
    words = np.random.SeedSequence([seed, rank]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] % 2**32))
    torch.manual_seed(int(words[2] >> 1))


def random_states() -> dict[str, Any]:
    """Return the states of the random generators of this process, for `restore_random_states`."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": {"version": version, "internal": np.array(internal), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": keys,
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Take back what `random_states` returned."""
    python, legacy = states["python"], states["numpy"]
    internal = tuple(int(word) for word in python["internal"])
    random.setstate((python["version"], internal, python["gauss"]))
    np.random.set_state(
        (
            legacy["name"],
            np.asarray(legacy["keys"]),
            legacy["position"],
            legacy["has_gauss"],
            legacy["cached"],
        )
    )
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def gather_to_main(value: Any) -> list[Any] | None:
    """Return the values of all ranks in their order on rank 0, None elsewhere. A collective.

    For rare moments such as a checkpoint. Values travel as `wire.encode` describes: tuples come
    back as lists, tensors on the CPU, with one rank too.

    Raises:
        TypeError: a value that does not travel.
    """
    where = topology()
    if where.world_size == 1:
        return [decode(encode(value))]
    mine, sizes = _padded(encode(value))
    all_bytes = [torch.empty_like(mine) for _ in sizes] if where.is_main else None
    dist.gather(mine, all_bytes)
    if all_bytes is None:
        return None
    return [_value(data, size) for data, size in zip(all_bytes, sizes, strict=True)]


def gather_to_all(value: Any) -> list[Any]:
    """Return the values of all ranks in their order, on all ranks. A collective, as above."""
    if topology().world_size == 1:
        return [decode(encode(value))]
    mine, sizes = _padded(encode(value))
    all_bytes = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(all_bytes, mine)
    return [_value(data, size) for data, size in zip(all_bytes, sizes, strict=True)]


def broadcast_from_main(value: Any) -> Any:
    """Return rank 0's value on all ranks. A collective for rare moments, as above."""
    where = topology()
    data = encode(value) if where.is_main else b""
    if where.world_size == 1:
        return decode(data)
    size = torch.tensor([len(data)], device=_host_device())
    dist.broadcast(size, 0)
    sent = _tensor(data.ljust(int(size), b"\0"))
    dist.broadcast(sent, 0)
    return _value(sent, int(size))


def _host_device() -> torch.device:
    """Return the device of tensors for the default group: the CPU unless it is for CUDA alone."""
    return torch.device("cpu") if "cpu" in dist.get_backend_config() else local_device()


def _padded(data: bytes) -> tuple[torch.Tensor, list[int]]:
    """Return this rank's bytes as a tensor as long as the longest, and the sizes of all ranks."""
    size = torch.tensor([len(data)], device=_host_device())
    sizes = [torch.empty_like(size) for _ in range(topology().world_size)]
    dist.all_gather(sizes, size)
    lengths = [int(each) for each in sizes]
    return _tensor(data.ljust(max(lengths), b"\0")), lengths


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_host_device())


def _value(data: torch.Tensor, size: int) -> Any:
    return decode(data[:size].cpu().numpy().tobytes())
