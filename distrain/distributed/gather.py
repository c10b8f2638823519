"""All-gather through which gradients flow, for losses over the samples of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.distributed.ranks import topology


def gather_with_gradients(rows: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order: (n, ...) -> (world_size * n, ...). A collective.

    Where each rank's loss is a mean over its own rows, compared with those of all ranks, the
    gradients are those of one process with all rows: each rank's rows get the sum of the gradients
    of all losses, and the step takes the mean over ranks. With one rank it returns `rows`.

    Args:
        rows: the same shape on all ranks. Not in an evaluation, where ranks have other numbers of
            batches.
    """
    if topology().world_size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


# torch.distributed.nn.functional.all_gather is deprecated, and its successor's gradient is a
# reduce-scatter, which gloo lacks
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num = len(rows)
        parts = [torch.empty_like(rows) for _ in range(topology().world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        begin = topology().rank * ctx.num
        return total[begin : begin + ctx.num]
