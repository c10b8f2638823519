"""A copy of the model on each rank: DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Replicated(DistributedDataParallel):
    """Opens a range of the profiler around a forward only while somebody profiles.

    torch opens it always, and on a CPU that takes as long as a small layer.
    """

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        ddp: Any = super()  # it has no types
        if torch.autograd.profiler._is_profiler_enabled or self._delay_all_reduce_all_params:
            return ddp.forward(*inputs, **kwargs)
        inputs, kwargs = ddp._pre_forward(*inputs, **kwargs)
        return ddp._post_forward(ddp._run_ddp_forward(*inputs, **kwargs))


def replicate(
    module: nn.Module, device: torch.device, world_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Return the model behind DistributedDataParallel; the model itself for one rank.

    Args:
        module: the model, on the device.
        device: of this rank.
        world_size: how many ranks there are.
        options: keywords of DistributedDataParallel, before our own.
    """
    if world_size == 1:
        return module
    options = {
        "gradient_as_bucket_view": True,
        "forward_sync_buffers": has_own_buffers(module),
    } | dict(options)
    device_ids = [device] if device.type == "cuda" else None
    return Replicated(module, device_ids=device_ids, **options)


def has_own_buffers(module: nn.Module) -> bool:
    """Whether ranks may come to hold different buffers: those of SyncBatchNorm stay equal."""
    return any(
        "SyncBatchNorm" not in type(part).__name__
        for part in module.modules()
        for _ in part.buffers(recurse=False)
    )
