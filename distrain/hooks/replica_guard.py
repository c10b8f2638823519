"""Ranks that no longer hold the same model are found and named."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.distributed import gather_to_all
from distrain.errors import ConfigError, ReplicaDrift
from distrain.hook import HookBase
from distrain.log import logger
from distrain.replicas import has_own_buffers
from distrain.strategy import is_sharded
from distrain.trainer import Trainer

_BYTES_TO_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = 24  # what a float32 holds exactly, for the spread over ranks is one


class ReplicaGuard(HookBase):
    """Compares parameters, buffers and optimizer state over ranks every so many iterations.

    Each rank puts a checksum of the bits of all tensors as the scalar `guard/checksum`; it travels
    with the window's collective, so nothing is waited for. Two ranks that differ go unnoticed with
    a chance of one in 16 million. Buffers are left out where ranks may differ in them, and shards,
    of which there is no copy: of a sharded model buffers and counters are compared, if any.

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
        self._checked = -1  # the iteration whose checksum is on its way

    def after_step(self) -> None:
        """Put a checksum if it is time; look at the one that came back."""
        trainer = self.trainer
        self._judge()
        if trainer.iter_done % self._period == 0:
            tensors = list(self._tensors().values())
            if not tensors:
                return
            self._checked = trainer.iter
            value = checksum(tensors)
            trainer.storage.put_scalar("guard/checksum", value, smoothing_hint=False)

    def before_train(self) -> None:
        """Say so where there is little to compare."""
        self.is_idle = self.trainer.where.world_size == 1
        if self.trainer.is_sharded and self.trainer.where.is_main:
            logger.info("replica guard: a sharded model has no replicas; shards are not compared")

    def after_last_step(self) -> None:
        """Judge the last checksum, before anything is saved."""
        self._judge()

    def _judge(self) -> None:
        """Raise ReplicaDrift if a checksum has come back that differs."""
        if self._has_returned():
            self._checked = -1
            spread = self.trainer.storage.spread("guard/checksum")
            if spread.min != spread.max:
                raise ReplicaDrift(self._describe())

    def _has_returned(self) -> bool:
        newest = self.trainer.storage.latest_iteration
        return 0 <= self._checked <= newest("guard/checksum")

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

    def _describe(self) -> str:
        """Say which tensors differ on which ranks; a collective, for all ranks found the same."""
        mine = {name: int(bit_sum(tensor)) for name, tensor in self._tensors().items()}
        first, *others = gather_to_all(mine)
        ranks: set[int] = set()
        differing = []
        for name in first:
            odd = [rank for rank, sums in enumerate(others, 1) if sums.get(name) != first[name]]
            if odd:
                ranks.update(odd)
                differing.append(name)
        shown = ", ".join(differing[:5]) + (
            f" and {len(differing) - 5} more" * (len(differing) > 5)
        )
        where = ", ".join(map(str, sorted(ranks)))
        return (
            f"rank {where} does not hold the same as rank 0 any more after iteration "
            f"{self.trainer.iter_done}: {shown or 'a tensor that has changed since'}. Memory of a "
            "machine may be broken, or code changes weights on some ranks only; the checkpoints "
            "since are not to be trusted"
        )


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the () int64 sum of a tensor's elements, read as integers of their size."""
    if tensor.dtype is torch.bool:
        tensor = tensor.to(torch.uint8)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1)
    return flat.view(_BYTES_TO_INTEGER[flat.element_size()]).sum(dtype=torch.int64)


def checksum(tensors: list[Tensor]) -> Tensor:
    """Return a () float32 checksum of tensors, on the device of the first, without reading back."""
    device = tensors[0].device
    sums = torch.stack([bit_sum(t).to(device, non_blocking=True) for t in tensors])
    # an odd factor for each keeps two tensors that were swapped apart
    factors = torch.arange(1, 2 * len(tensors), 2, device=device)
    total = (sums * factors).sum()
    total = total ^ (total >> 24) ^ (total >> 48)
    return (total & ((1 << _BITS) - 1)).to(torch.float32)
