"""What a batch is to the loop: tensors in dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device, without waiting for the copies.

    Args:
        batch: tensors in dicts, lists, tuples and named tuples; the rest stays as it is. Loaders
            make batches on the CPU, so that for the CPU there is nothing to do.
        device: where to.
    """
    if device.type == "cpu" and not isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(part, device) for part in batch)
    return batch


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor.

    Args:
        batch: as for `to_device`.

    Raises:
        ValueError: no tensor in it has a dimension.
    """
    length = _first_dimension(batch)
    if length is None:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no tensor with a dimension to count "
            "samples by; give batches as tensors in dicts, lists or tuples"
        )
    return length


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = [*batch.values()]
    if isinstance(batch, (tuple, list)):
        for part in batch:
            length = _first_dimension(part)
            if length is not None:
                return length
    return None


def to_channels_last(batch: Any) -> Any:
    """Return a batch with its images, the tensors of four dimensions, in that memory format."""
    if isinstance(batch, Tensor) and batch.dim() == 4:
        return batch.contiguous(memory_format=torch.channels_last)
    if isinstance(batch, Mapping):
        return {name: to_channels_last(part) for name, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_channels_last(part) for part in batch)
    return batch
