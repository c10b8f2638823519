"""Optimizer states that torchao quantizes to 8 bits, as plain tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_KIND = "OptimState8bit"  # of torchao.optim: a tensor made of three others
_PARTS = ("codes", "scale", "qmap")


def to_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `Optimizer.state_dict()`, its quantized tensors as dicts of plain ones."""
    return {**state, "state": _each(state["state"], _parts)}


def from_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that `to_plain` got."""
    return {**state, "state": _each(state["state"], _whole)}


def _each(entries: Mapping[Any, Any], change: Any) -> dict[Any, Any]:
    return {
        number: {key: change(value) for key, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for number, entry in entries.items()
    }


def _parts(value: Any) -> Any:
    if type(value).__name__ != _KIND:
        return value
    parts = {name: getattr(value, name) for name in _PARTS}
    dtype = str(value.dtype).removeprefix("torch.")
    return {"kind": _KIND, "signed": bool(value.signed), "dtype": dtype, **parts}


def _whole(value: Any) -> Any:
    if not isinstance(value, Mapping) or value.get("kind") != _KIND:
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    parts = (value[name] for name in _PARTS)
    return OptimState8bit(*parts, value["signed"], dtype=getattr(torch, value["dtype"]))
