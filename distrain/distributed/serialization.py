"""Encoding of values for other ranks: JSON and raw arrays, which execute nothing, unlike pickle.

::

    8 bytes    length of the JSON, little endian
    JSON       the value; an array is {"$array": [library, dtype, shape]}
    bytes      of the arrays, in the order of the JSON
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ARRAY = "$array"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_NUMPY_KINDS = "biufc"


def encode(value: Any) -> bytes:
    """Return a value as bytes for `decode`.

    Args:
        value: None, bool, int, float (NaN and infinities too), str, tensors, numpy arrays, and
            lists, tuples and dicts with text as keys of these; TypeError for anything else.
    """
    arrays: list[bytes] = []
    text = json.dumps(_plain(value, "value", arrays)).encode()
    return b"".join([struct.pack("<Q", len(text)), text, *arrays])


def decode(data: bytes) -> Any:
    """Return the value of `encode`, tuples as lists, tensors on CPU; ValueError for other bytes."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        rest = memoryview(data)[8 + length :]
        value, rest = _restored(json.loads(data[8 : 8 + length]), rest)
    except (struct.error, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the bytes of another rank are no encoded value: {error}") from error
    if rest:
        raise ValueError(f"the bytes of another rank have {len(rest)} more than their value")
    return value


def _plain(value: Any, place: str, arrays: list[bytes]) -> Any:
    """Return a value as JSON values; the bytes of its arrays are appended to `arrays`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{place}[{i}]", arrays) for i, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(k, str) and k != _ARRAY for k in value):
        return {key: _plain(each, f"{place}.{key}", arrays) for key, each in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMPY_KINDS:
        arrays.append(value.tobytes())
        return {_ARRAY: ["numpy", value.dtype.str, list(value.shape)]}
    if isinstance(value, Tensor) and (name := str(value.dtype)[len("torch.") :]) in _DTYPES:
        flat = value.detach().cpu().reshape(-1).contiguous()
        arrays.append(flat.view(torch.uint8).numpy().tobytes())
        return {_ARRAY: ["torch", name, list(value.shape)]}
    kind = f"{type(value).__name__} {value.dtype}" if hasattr(value, "dtype") else type(value)
    raise TypeError(
        f"{place}: {kind} cannot be sent to other ranks; expected numbers, text, tensors, arrays, "
        "lists and dicts with text as keys"
    )


def _restored(node: Any, data: memoryview) -> tuple[Any, memoryview]:
    """Return the value of a JSON value, and the remaining bytes."""
    if isinstance(node, list):
        values = []
        for each in node:
            value, data = _restored(each, data)
            values.append(value)
        return values, data
    if not isinstance(node, dict):
        return node, data
    if _ARRAY not in node:
        restored: dict[str, Any] = {}
        for key, each in node.items():
            restored[key], data = _restored(each, data)
        return restored, data
    library, name, shape = node[_ARRAY]
    if library == "numpy":
        dtype = np.dtype(name)
        if dtype.kind not in _NUMPY_KINDS:
            raise ValueError(f"an array of {name}: expected numbers")
        size = math.prod(shape) * dtype.itemsize
        return np.frombuffer(bytearray(data[:size]), dtype).reshape(shape), data[size:]
    size = math.prod(shape) * _DTYPES[name].itemsize
    raw = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8) if size else torch.empty(0)
    flat = raw.view(_DTYPES[name]) if size else raw.to(_DTYPES[name])
    return flat.reshape(shape), data[size:]
