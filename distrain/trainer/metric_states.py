"""States of torchmetrics objects: gathered from all ranks and merged on one.

torchmetrics gathers a list state one element at a time, by one collective each, which hangs where
ranks have different numbers of elements. Here the whole state travels at once, and lists are
joined in the order of the samples: they are those of one process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_object(metric: Any) -> bool:
    """Whether a metric is an object of torchmetrics."""
    library = sys.modules.get("torchmetrics")  # where it is not imported, there are none
    return library is not None and isinstance(metric, (library.Metric, library.MetricCollection))


def parts_of(metric: Any) -> list[Any]:
    """Return the metrics with states in a torchmetrics object: of a collection, of a wrapper."""
    library = sys.modules["torchmetrics"]
    # copies, as members of one compute group share their state
    is_collection = isinstance(metric, library.MetricCollection)
    members = metric.values(copy_state=True) if is_collection else [metric]
    found = [part for member in members for part in member.modules()]
    return [*dict.fromkeys(part for part in found if isinstance(part, library.Metric))]


def merge_states(metric: Any, ranks: Sequence[Sequence[dict[str, Any] | None]]) -> None:
    """Give a metric the states of all ranks: lists joined, tensors by the state's reduction.

    Args:
        metric: a torchmetrics object.
        ranks: per rank, the state of each of `parts_of(metric)`; None where it was never updated.
    """
    for part, states in zip(parts_of(metric), zip(*ranks, strict=True), strict=True):
        filled = [state for state in states if state is not None]
        if not filled:
            continue
        for name, reduction in part._reductions.items():
            found = [state[name] for state in filled]
            if isinstance(found[0], Tensor):
                tensors = [tensor.to(part.device) for tensor in found]
                merged = tensors[0]
                if len(tensors) > 1:
                    stacked = torch.stack(tensors)
                    merged = stacked if reduction is None else reduction(stacked)
                setattr(part, name, merged)
            else:
                device = torch.device("cpu") if part.compute_on_cpu else part.device
                joined = [element for elements in found for element in elements]
                setattr(part, name, [_on_device(element, device) for element in joined])


@contextmanager
def unsynced(metric: Any) -> Iterator[None]:
    """Let a torchmetrics object compute without a synchronisation of its own."""
    parts = parts_of(metric)
    before = [part.distributed_available_fn for part in parts]
    for part in parts:
        part.distributed_available_fn = _is_alone
    try:
        yield
    finally:
        for part, function in zip(parts, before, strict=True):
            part.distributed_available_fn = function


def _is_alone() -> bool:
    return False


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_on_device(part, device) for part in value] if isinstance(value, list) else value
