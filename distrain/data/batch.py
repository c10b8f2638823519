"""Nested batches: move to a device, length, channels_last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from distrain.errors import ConfigError


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device, copied asynchronously.

    Args:
        batch: tensors in dicts, lists, tuples, named tuples, dataclasses, and objects with a method
            `to(device)`, nested in any way, on the CPU. Values without tensors stay as they are.
        device: the device of this rank.

    Raises:
        ConfigError: an object of another kind holds tensors.
    """
    if device.type == "cpu" and not isinstance(batch, Tensor):
        return batch

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.device == device else value.to(device, non_blocking=True)
        if callable(getattr(value, "to", None)):
            return _moved(value, device)
        if _holds_tensors(value):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise ConfigError(
                "batch: expected tensors in dicts, lists, tuples, dataclasses or objects with a "
                f"method to(device), got {kind}, whose tensors cannot "
                f"be moved to {device}; give it a method to(device) that returns a copy"
            )
        return value

    return _rebuilt(batch, move)


def _moved(value: Any, device: torch.device) -> Any:
    try:
        moved = value.to(device, non_blocking=True)
    except TypeError:  # it takes a device only
        moved = value.to(device)
    return value if moved is None else moved  # some move in place


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Whether an object has tensors in its attributes, down to a depth."""
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, type):
        return False
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
        names = [name for of in slots for name in ([of] if isinstance(of, str) else of)]
        names += getattr(value, "__dict__", {})
        parts = (getattr(value, name, None) for name in names)
    return any(_holds_tensors(part, depth - 1) for part in parts)


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return a batch of the same containers, with `change` applied to every value in them.

    A container with a method `to` counts as a value.
    """
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return change(batch)
    if isinstance(batch, Mapping):
        parts = {name: _rebuilt(part, change) for name, part in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return parts
        mapping = copy.copy(batch)  # an OrderedDict, or a class of the user with attributes
        for name, part in parts.items():
            mapping[name] = part
        return mapping
    if isinstance(batch, (tuple, list)):
        items = [_rebuilt(part, change) for part in batch]
        if hasattr(batch, "_make"):  # a named tuple
            return batch._make(items)
        return type(batch)(items)
    if is_dataclass(batch) and not isinstance(batch, type):
        # not dataclasses.replace: it runs __init__, and refuses fields that it does not take
        made = copy.copy(batch)
        for name in _attributes(batch):
            part = _rebuilt(getattr(batch, name), change)
            object.__setattr__(made, name, part)  # also of a frozen one
        return made
    return change(batch)


def _attributes(batch: Any) -> list[str]:
    """Return the names of a dataclass's fields that are set, and of its other attributes."""
    set_fields = [field.name for field in fields(batch) if hasattr(batch, field.name)]
    return list(dict.fromkeys([*set_fields, *getattr(batch, "__dict__", {})]))


def batch_length(batch: Any) -> int:
    """Return the length of a batch (see `to_device`): the first dimension of its first tensor.

    Raises:
        ValueError: no tensor in it has a dimension.
    """
    length = _first_dimension(batch)
    if length is None:
        raise ValueError(
            f"batch: expected tensors in dicts, lists, tuples or dataclasses, one with a dimension "
            f"of samples; got {type(batch).__name__}"
        )
    return length


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])  # of the first time step, which all sequences have
    if isinstance(batch, Mapping):
        batch = [*batch.values()]
    elif is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, name) for name in _attributes(batch)]
    if isinstance(batch, (tuple, list)):
        for part in batch:
            length = _first_dimension(part)
            if length is not None:
                return length
    return None


def to_channels_last(batch: Any) -> Any:
    """Return a batch with its images, the tensors of four dimensions, in that memory format.

    Objects with a method `to` stay as they are.
    """

    def change(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value

    return _rebuilt(batch, change)
