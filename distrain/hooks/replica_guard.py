"""ReplicaGuard: detect ranks whose copies of the model differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distrain.distributed.collectives import gather_to_all
from distrain.distributed.ddp import has_own_buffers
from distrain.distributed.fsdp import is_sharded
from distrain.errors import ReplicaDrift
from distrain.hooks.periodic import Period, checked_period, ends_period, in_iterations
from distrain.log import logger
from distrain.scalar_names import GUARD
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

_CHECKSUM = f"{GUARD}checksum"
_BYTES_TO_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHECKSUM_BITS = 24  # exact in float32, the dtype of the spread over ranks
_MAX_NAMES = 5  # in the error


class _Checked(NamedTuple):
    """Bit sums at the time of a checksum."""

    iteration: int
    names: tuple[str, ...]  # of the N tensors
    sums: Tensor  # (N,) int64, on the device


class ReplicaGuard(HookBase):
    """Compares parameters, buffers and optimizer state over ranks every `period` iterations.

    Each rank puts a checksum of the bits of all tensors as the scalar `guard/checksum`; it travels
    with the window's collective, so no step waits for it. The verdict comes later by up to a second
    of steps; the error names the tensors that differed when the checksum was taken. Two ranks that
    differ have equal checksums with a probability of 1 in 16 million. Not compared are shards,
    which have no replicas, and buffers where ranks may differ in them.

    Args:
        period: in iterations, or text as "1 epoch".

    Raises:
        ReplicaDrift: from a later iteration, on all ranks, when the checksums differ.
    """

    order = 55
    trainer: Trainer

    def __init__(self, period: Period = 1000) -> None:
        self._period = checked_period(period)
        self._in_flight: list[_Checked] = []  # oldest first; the same iterations on all ranks

    def before_train(self) -> None:
        self._period = in_iterations(self, self._period)
        self._in_flight = []
        self.is_idle = self.trainer.where.world_size == 1
        if self.trainer.is_sharded and self.trainer.where.is_main:
            logger.info("replica guard: a sharded model has no replicas; shards are not compared")

    def after_step(self) -> None:
        trainer = self.trainer
        self._judge()
        if ends_period(trainer.iter_done, self._period) and (tensors := self._tensors()):
            sums = bit_sums(list(tensors.values()))
            self._in_flight.append(_Checked(trainer.iter, tuple(tensors), sums))
            trainer.storage.put_scalar(_CHECKSUM, checksum(sums), smoothing_hint=False)

    def after_last_step(self) -> None:
        self._judge()  # before anything is saved

    def _judge(self) -> None:
        """Raise ReplicaDrift if a reduced checksum differs over ranks."""
        if not self._in_flight:
            return
        storage = self.trainer.storage
        newest = storage.latest_iteration(_CHECKSUM)
        returned = [checked for checked in self._in_flight if checked.iteration <= newest]
        if returned:
            self._in_flight = self._in_flight[len(returned) :]
            spread = storage.spread(_CHECKSUM)  # over all checksums of the last window
            if spread.min != spread.max:
                raise ReplicaDrift(_describe(returned))

    def _tensors(self) -> dict[str, Tensor]:
        module = self.trainer.module
        parameters = dict(module.named_parameters())
        tensors = {f"model.{n}": p.detach() for n, p in parameters.items() if not is_sharded(p)}
        if not has_own_buffers(module):
            tensors |= {f"model.{name}": buffer for name, buffer in module.named_buffers()}
        for name, parameter in parameters.items():
            for optimizer in self.trainer.optimizers.values():
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and not is_sharded(value):
                        tensors[f"optimizer.{name}.{key}"] = value
        return tensors


def _describe(returned: Sequence[_Checked]) -> str:
    """Name the tensors and ranks of the first difference. A collective."""
    mine = [dict(zip(names, sums.tolist(), strict=True)) for _, names, sums in returned]
    sums_of_ranks = zip(*gather_to_all(mine), strict=True)
    iteration, (first, *others) = next(
        (checked.iteration, sums)
        for checked, sums in zip(returned, sums_of_ranks, strict=True)
        if any(other != sums[0] for other in sums)
    )
    names = dict.fromkeys(name for sums in (first, *others) for name in sums)
    differing = [n for n in names if any(sums.get(n) != first.get(n) for sums in others)]
    ranks = [str(rank) for rank, sums in enumerate(others, 1) if sums != first]
    num_more = len(differing) - _MAX_NAMES
    return (
        f"replicas differ: rank {', '.join(ranks)} from rank 0 after iteration {iteration + 1}, in "
        + ", ".join(differing[:_MAX_NAMES])
        + (f" and {num_more} more" if num_more > 0 else "")
        + "; memory may be faulty, or code changes weights on some ranks only. Resume from a "
        "checkpoint before that iteration"
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
    # odd factors, so that swapped tensors change the checksum
    factors = torch.arange(1, 2 * len(sums), 2, device=sums.device)
    total = (sums * factors).sum()
    total = total ^ (total >> 24) ^ (total >> 48)
    return (total & ((1 << _CHECKSUM_BITS) - 1)).to(torch.float32)
