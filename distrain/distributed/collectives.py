"""Gather and broadcast of objects, for rare moments such as a checkpoint; a sum on the device.

Values travel as `serialization.encode` describes: tuples come back as lists, tensors on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distrain.distributed.ranks import local_device, topology
from distrain.distributed.serialization import decode, encode


def gather_to_main(value: Any) -> list[Any] | None:
    """Return the values of all ranks in rank order on rank 0, None elsewhere. A collective.

    Raises:
        TypeError: a value that cannot be encoded.
    """
    where = topology()
    if where.world_size == 1:
        return [decode(encode(value))]
    mine, sizes = _padded(encode(value))
    buffers = [torch.empty_like(mine) for _ in sizes] if where.is_main else None
    dist.gather(mine, buffers)
    return None if buffers is None else _values(buffers, sizes)


def gather_to_all(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order, on all ranks. A collective.

    Raises:
        TypeError: a value that cannot be encoded.
    """
    if topology().world_size == 1:
        return [decode(encode(value))]
    mine, sizes = _padded(encode(value))
    buffers = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(buffers, mine)
    return _values(buffers, sizes)


def broadcast_from_main(value: Any) -> Any:
    """Return rank 0's value on all ranks. A collective.

    Raises:
        TypeError: a value that cannot be encoded.
    """
    where = topology()
    data = encode(value) if where.is_main else b""
    if where.world_size == 1:
        return decode(data)
    size = torch.tensor([len(data)], device=_device())
    dist.broadcast(size, 0)
    buffer = _tensor(data.ljust(int(size), b"\0"))
    dist.broadcast(buffer, 0)
    return _values([buffer], [int(size)])[0]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks of a tensor, on its device, not read back. A collective."""
    total = tensor.clone()
    if topology().world_size > 1:
        dist.all_reduce(total)
    return total


def _device() -> torch.device:
    """Return the device of tensors for the default group: the CPU unless it is for CUDA alone."""
    return torch.device("cpu") if "cpu" in dist.get_backend_config() else local_device()


def _padded(data: bytes) -> tuple[torch.Tensor, list[int]]:
    """Return this rank's bytes, padded to the longest of all ranks, and all lengths."""
    size = torch.tensor([len(data)], device=_device())
    sizes = [torch.empty_like(size) for _ in range(topology().world_size)]
    dist.all_gather(sizes, size)
    lengths = [int(each) for each in sizes]
    return _tensor(data.ljust(max(lengths), b"\0")), lengths


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device())


def _values(buffers: list[torch.Tensor], sizes: list[int]) -> list[Any]:
    pairs = zip(buffers, sizes, strict=True)
    return [decode(buffer[:size].cpu().numpy().tobytes()) for buffer, size in pairs]
