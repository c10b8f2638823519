"""Load checkpoints: every byte is checked against its sha256, and no code is executed."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from base64 import b64decode
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from distrain.checkpoint import format as fmt
from distrain.checkpoint.encode import SAFETENSORS_DTYPES
from distrain.files.retry import read_file, retried

TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_NUMPY_DTYPE = re.compile(r"[<>|=][biufc]\d+")


def load_checkpoint(
    path: str | Path, *, map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Return the state in the checkpoint of a folder, its torch tensors on `map_location`.

    Raises:
        CheckpointDamaged: a file differs from what was written.
        OSError: a file cannot be read, after retries.
    """
    folder = os.fspath(path)
    fmt.verify(folder)
    text = read_file(os.path.join(folder, fmt.STATE_FILE))
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fmt.CheckpointDamaged(f"{folder}/{fmt.STATE_FILE} is not JSON: {error}") from error
    readers: dict[str, Any] = {}
    try:
        for name in (fmt.MODEL_FILE, fmt.TRAINING_FILE):
            readers[name] = retried(partial(_open_tensors, os.path.join(folder, name)))
        # tensors of safe_open are views of the file; a copy outlives changes to it
        return decode(
            tree,
            lambda file, name: readers[file].get_tensor(name).clone(),
            torch.device(map_location),
        )
    except OSError:
        raise
    except Exception as error:  # a forged file may raise anything
        raise fmt.CheckpointDamaged(
            f"{folder} cannot be decoded: {type(error).__name__}: {error}"
        ) from error
    finally:
        readers.clear()


def _open_tensors(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        # safetensors reports every failure of open(2) as a missing file, but it was just verified
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        raise OSError(errno.EIO, str(error), path) from error


def decode(
    tree: Mapping[str, Any], tensor: Callable[[str, str], Tensor], device: torch.device
) -> dict[str, Any]:
    """Decode a state; the inverse of `encode`.

    Args:
        tree: parts by name.
        tensor: (file, name) -> tensor on the CPU that owns its memory.
        device: of all torch tensors.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: `encode` cannot have made this tree.
    """
    state = {}
    for part, node in tree.items():
        file = fmt.MODEL_FILE if part == fmt.MODEL_PART else fmt.TRAINING_FILE
        state[part] = _Decoder(partial(tensor, file), device).decode(node)
    return state


class _Decoder:
    """Recursive decoder of one part."""

    def __init__(self, tensor: Callable[[str], Tensor], device: torch.device) -> None:
        self._tensor = tensor
        self._device = device

    def decode(self, node: Any) -> Any:
        """Return the value encoded by a JSON value."""
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        tag: str = next(iter(node), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in node.items()}
        body: Any = node[tag]
        if tag == "$tensor":
            keywords = {key: value for key, value in node.items() if key != tag}
            return _decode_tensor(self._tensor(body), **keywords).to(self._device)
        if tag == "$array":
            return _decode_array(self._tensor(body), node["dtype"], node["shape"])
        if tag == "$scalar":
            return np.frombuffer(bytes.fromhex(body), _numpy_dtype(node["dtype"]), count=1)[0]
        if tag == "$tuple":
            return tuple(self.decode(item) for item in body)
        if tag in ("$dict", "$ordered", "$counter"):
            return self._decode_pairs(tag, body, node.get("metadata"))
        return _decode_atom(tag, body)

    def _decode_pairs(self, tag: str, rows: list[list[Any]], metadata: Any) -> dict[Any, Any]:
        pairs = [(self.decode(key), self.decode(item)) for key, item in rows]
        if tag == "$counter":
            return Counter(dict(pairs))
        if tag == "$dict":
            return dict(pairs)
        ordered = OrderedDict(pairs)
        if metadata is not None:
            ordered._metadata = self.decode(metadata)  # type: ignore[attr-defined]
        return ordered


def _decode_atom(tag: str, body: str) -> Any:
    if tag == "$int":
        return int(body, 16)
    if tag == "$float":
        return struct.unpack(">d", bytes.fromhex(body))[0]
    if tag == "$bytes":
        return b64decode(body, validate=True)
    if tag == "$str":
        return b64decode(body, validate=True).decode("utf-8", "surrogatepass")
    raise ValueError(f"unknown tag {tag!r}")


def _decode_tensor(
    stored: Tensor, *, dtype: str, shape: list[int], order: list[int] | None = None
) -> Tensor:
    if dtype not in SAFETENSORS_DTYPES:
        stored = stored.view(TORCH_DTYPES[dtype]).reshape(shape)
    if stored.dtype != TORCH_DTYPES[dtype] or list(stored.shape) != shape:
        raise ValueError(f"a tensor is {stored.dtype} {list(stored.shape)}, not {dtype} {shape}")
    if order is None:
        return stored
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return stored.permute(order).contiguous().permute(inverse)


def _numpy_dtype(text: str) -> np.dtype[Any]:
    if _NUMPY_DTYPE.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a dtype of numbers")
    return np.dtype(text)


def _decode_array(stored: Tensor, dtype: str, shape: list[int]) -> NDArray[Any]:
    return stored.reshape(-1).view(torch.uint8).numpy().view(_numpy_dtype(dtype)).reshape(shape)
