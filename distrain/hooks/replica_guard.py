"""Ranks that no longer hold the same model are found and named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distrain.distributed.collectives import gather_to_all
from distrain.distributed.ddp import has_own_buffers
from distrain.distributed.fsdp import is_sharded
from distrain.errors import ConfigError, ReplicaDrift
from distrain.log import logger
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

_BYTES_TO_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = 24  # what a float32 holds exactly, for the spread over ranks is one


class _Checked(NamedTuple):
    """The tensors of one iteration, as they were when its checksum was put.

    Attributes:
        iteration: index of the iteration.
        names: of the N tensors.
        sums: (N,) int64, their bit sums, on the device.
    """

    iteration: int
    names: tuple[str, ...]
    sums: Tensor


class ReplicaGuard(HookBase):
    """Compares parameters, buffers and optimizer state over ranks every `period` iterations.

    Each rank puts a checksum of the bits of all tensors as the scalar `guard/checksum`; it travels
    with the window's collective, so no step waits for it. The sum per tensor stays on the device
    until the verdict, which comes later by up to a second of steps: the error names the tensors
    that differed when the checksum was taken, however far training went on since. Two ranks that
    differ go unnoticed with a probability of 1 in 16 million. Buffers are left out where ranks may
    differ in them, and shards, of which there is no copy: of a sharded model buffers and counters
    are compared, if any.

    Args:
        period: in iterations.

    Raises:
        ReplicaDrift: from a later iteration, on all ranks, when the checksums differ.
    """

    order = 55
    trainer: Trainer

    def __init__(self, period: int = 1000) -> None:
        if period < 1:
            raise ConfigError(f"period={period}; it is at least 1 iteration")
        self._period = period
        self._in_flight: list[_Checked] = []  # oldest first; the same iterations on all ranks

    def after_step(self) -> None:
        """Judge the checksums that came back; put one if it is time."""
        trainer = self.trainer
        self._judge()
        if trainer.iter_done % self._period == 0:
            tensors = self._tensors()
            if not tensors:
                return
            sums = bit_sums(list(tensors.values()))
            self._in_flight.append(_Checked(trainer.iter, tuple(tensors), sums))
            trainer.storage.put_scalar("guard/checksum", checksum(sums), smoothing_hint=False)

    def before_train(self) -> None:
        """Say so where there is little to compare."""
        self._in_flight = []
        self.is_idle = self.trainer.where.world_size == 1
        if self.trainer.is_sharded and self.trainer.where.is_main:
            logger.info("replica guard: a sharded model has no replicas; shards are not compared")

    def after_last_step(self) -> None:
        """Judge the last checksum, before anything is saved."""
        self._judge()

    def _judge(self) -> None:
        """Raise ReplicaDrift if a checksum that has come back differs."""
        if not self._in_flight:
            return
        storage = self.trainer.storage
        newest = storage.latest_iteration("guard/checksum")
        returned = [checked for checked in self._in_flight if checked.iteration <= newest]
        if returned:
            self._in_flight = self._in_flight[len(returned) :]
            spread = storage.spread("guard/checksum")  # over all that came with the last window
            if spread.min != spread.max:
                raise ReplicaDrift(_describe(returned))

    def _tensors(self) -> dict[str, Tensor]:
        module = self.trainer.module
        parameters = {n: p for n, p in module.named_parameters() if not is_sharded(p)}
        tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
        if not has_own_buffers(module):
            tensors |= {f"model.{name}": buffer for name, buffer in module.named_buffers()}
        for name, parameter in module.named_parameters():
            for key, value in self.trainer.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not is_sharded(value):
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors


def _describe(returned: Sequence[_Checked]) -> str:
    """Name the tensors and ranks of the first difference; a collective, called on all ranks."""
    mine = [dict(zip(names, sums.tolist(), strict=True)) for _, names, sums in returned]
    of_ranks = zip(*gather_to_all(mine), strict=True)
    iteration, (first, *others) = next(
        (checked.iteration, sums)
        for checked, sums in zip(returned, of_ranks, strict=True)
        if any(other != sums[0] for other in sums)
    )
    names = dict.fromkeys(name for sums in (first, *others) for name in sums)
    differing = [n for n in names if any(sums.get(n) != first.get(n) for sums in others)]
    ranks = [str(rank) for rank, sums in enumerate(others, 1) if sums != first]
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return (
        f"rank {', '.join(ranks)} does not hold the same as rank 0 any more after iteration "
        f"{iteration + 1}: {', '.join(differing[:5])}{more}. Memory of a machine may be broken, or "
        "code changes weights on some ranks only; the checkpoints since are not to be trusted"
    )


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the () int64 sum of a tensor's elements, read as integers of their size."""
    if tensor.dtype is torch.bool:
        tensor = tensor.to(torch.uint8)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1)
    return flat.view(_BYTES_TO_INTEGER[flat.element_size()]).sum(dtype=torch.int64)


def bit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the (N,) bit sums of N tensors, on the device of the first, without reading back."""
    device = tensors[0].device
    return torch.stack([bit_sum(tensor).to(device, non_blocking=True) for tensor in tensors])


def checksum(sums: Tensor) -> Tensor:
    """Return a () float32 checksum of (N,) bit sums, on their device, without reading back."""
    # an odd factor for each keeps two tensors that were swapped apart
    factors = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    total = (sums * factors).sum()
    total = total ^ (total >> 24) ^ (total >> 48)
    return (total & ((1 << _BITS) - 1)).to(torch.float32)
