"""States in the form in which ranks send them to each other: JSON text and tensors by name."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint.decode import decode
from distrain.checkpoint.encode import encode

_PART = "state"


def to_portable(state: Any) -> list[Any]:
    """Return a state as text and tensors by name; TypeError where `encode` raises it."""
    snapshot = encode({_PART: state})
    tensors = {
        tensor.name: tensor.source
        if isinstance(tensor.source, Tensor)
        else torch.from_numpy(tensor.source)
        for tensor in snapshot.tensors
    }
    return [json.dumps(snapshot.tree), tensors]


def from_portable(value: list[Any]) -> Any:
    """Return the state of `to_portable`, its tensors on the CPU."""
    text, tensors = value
    tree = json.loads(text)
    return decode(tree, lambda file, name: tensors[name], torch.device("cpu"))[_PART]
