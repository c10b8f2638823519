"""Ranks with different numbers of batches end an epoch together, without waiting in a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_NONE: Any = object()


def has_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class EpochEnds:
    """Agreement of all ranks that each of them has another batch. Constructing it is a collective.

    Each rank reads one batch ahead and starts an all-reduce of "I have it" on the CPU, which runs
    while the step trains on the batch before.

    Attributes:
        unused: the batch that this rank had read when another rank ended the epoch, if any.
    """

    def __init__(self) -> None:
        # of its own: collectives of two threads or purposes in one gloo group may hang
        self._group = dist.new_group(backend="gloo")
        self.unused: list[Any] = []

    def together(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches of one epoch, until they end on any rank."""
        batch = next(batches, _NONE)
        flag, work = self._start(batch)
        while True:
            work.wait()
            if not flag:
                break
            ahead = next(batches, _NONE)
            flag, work = self._start(ahead)
            yield batch
            batch = ahead
        self.unused = [] if batch is _NONE else [batch]

    def _start(self, batch: Any) -> tuple[torch.Tensor, Any]:
        flag = torch.tensor(int(batch is not _NONE))
        return flag, dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group, async_op=True)

    def total(self, number: int) -> int:
        """Return the sum of a number over ranks. A collective."""
        value = torch.tensor(number)
        dist.all_reduce(value, group=self._group)
        return int(value)


def lengths_of_ranks(length: int | None) -> list[int | None]:
    """Return the number of batches of each rank. A collective."""
    # a default group for CUDA alone does not gather tensors of the CPU
    device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    mine = torch.tensor([-1 if length is None else length], device=device)
    lengths = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, mine)
    return [None if number < 0 else number for number in map(int, lengths)]
