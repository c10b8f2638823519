"""Replicas without DDP: broadcast of a model, and the mean of gradients after the backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.distributed.ranks import topology
from distrain.errors import ConfigError

_BUCKET_ELEMENTS = 6 * 2**20  # 25 MB of float32, as in DDP


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all ranks the values of rank 0. A collective."""
    if topology().world_size == 1:
        return
    for bucket in _buckets([tensor.detach() for tensor in tensors]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat, 0)
        for tensor, values in zip(bucket, _split(flat, bucket), strict=True):
            tensor.copy_(values)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over ranks. A collective.

    A gradient that some ranks lack is 0 there; one that all ranks lack stays None. Only a rank that
    lacks one reads back whether others have it.

    Args:
        parameters: in the same order on all ranks.

    Raises:
        ConfigError: a gradient is sparse.
    """
    world_size = topology().world_size
    if world_size == 1:
        return
    sent = []
    for bucket in _buckets(parameters):
        for parameter in bucket:
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ConfigError(
                    "step: a gradient is sparse, which is not averaged over ranks; use sparse=False"
                )
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        present = [gradients[0].new_full((), float(p.grad is not None)) for p in bucket]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.stack(present)])
        flat /= world_size
        buffer = torch.view_as_real(flat) if flat.is_complex() else flat
        sent.append((bucket, gradients, flat, dist.all_reduce(buffer, async_op=True)))
    for bucket, gradients, flat, work in sent:
        assert work is not None
        work.wait()
        torch._foreach_copy_(gradients, [*_split(flat, bucket)])
        if any(parameter.grad is None for parameter in bucket):
            found = (flat[-len(bucket) :].real != 0).tolist()
            for parameter, gradient, is_there in zip(bucket, gradients, found, strict=True):
                parameter.grad = gradient if is_there else None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype and device together, up to a size."""

    def kind(tensor: Tensor) -> tuple[str, str]:
        return str(tensor.dtype), str(tensor.device)

    for _, alike in groupby(sorted(tensors, key=kind), kind):
        bucket: list[Tensor] = []
        num = 0
        for tensor in alike:
            if bucket and num + tensor.numel() > _BUCKET_ELEMENTS:
                yield bucket
                bucket, num = [], 0
            bucket.append(tensor)
            num += tensor.numel()
        yield bucket


def _split(flat: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the parts of a flat tensor in the shapes of others."""
    begin = 0
    for tensor in like:
        yield flat[begin : begin + tensor.numel()].view(tensor.shape)
        begin += tensor.numel()
