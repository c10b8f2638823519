"""Encode a nested training state as a JSON tree and named tensors; inverse: `decode`.

In the tree a list is a JSON array, a dict whose keys are all str a JSON object, and any other type
an object with one key that begins with "$": {"$tuple": [...]}, {"$tensor": name, ...} and so on.
"""

from __future__ import annotations

import functools
import math
import struct
from base64 import b64encode
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from distrain.checkpoint.format import MODEL_FILE, MODEL_PART, TRAINING_FILE

ALLOWED = (
    "dict (also OrderedDict, Counter) with str or int keys, list, tuple, int, float, bool, str, "
    "bytes, None, dense torch tensors (of subclasses, too, unless they override "
    "__torch_dispatch__), numpy arrays and scalars of numbers"
)
MAX_DEPTH = 64
_BITS = (8, 16, 32, 64)
INT64 = range(-(1 << 63), 1 << 63)
KEY_TYPES = {str, int}
TENSOR_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
UNCOPIED_DTYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
# names of https://github.com/huggingface/safetensors by the names of torch and numpy; other dtypes
# are stored as bytes
SAFETENSORS_DTYPES = {
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in _BITS},
    **{f"float{bits}": f"F{bits}" for bits in _BITS[1:]},
    **{"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}


class NamedTensor(NamedTuple):
    """A tensor of a state: file, name, dtype and shape in safetensors, size and values.

    Attributes:
        source: the tensor, or a contiguous numpy array of its bytes.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Tensor | NDArray[np.uint8]


@dataclass
class Snapshot:
    """An encoded state.

    Attributes:
        tree: JSON values of the parts (top-level keys of the state), by name.
        tensors: those that the tree refers to, in its order; not copied.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    tensors: list[NamedTensor] = field(default_factory=list)


def encode(state: Mapping[str, Any]) -> Snapshot:
    """Encode a state: parts by name, such as model, optimizer, rng.

    Raises:
        TypeError: a value's type is not one of `ALLOWED`; the text has its dotted path.
    """
    encoder = _Encoder()
    for part, value in state.items():
        if type(part) is not str or not part or part.startswith("$"):
            raise TypeError(f"checkpoint state: {part!r} cannot name a part; use a plain str")
        encoder.snapshot.tree[part] = encoder.encode(value, (part,))
    return encoder.snapshot


class _Encoder:
    """Recursive encoder that fills a snapshot."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._names: set[tuple[str, str]] = set()

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        """Return the JSON value of `value` at `path`."""
        if len(path) > MAX_DEPTH:
            raise TypeError(f"checkpoint state at {'.'.join(path[:8])}...: nested in itself?")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if value in INT64 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is str:
            return _encode_str(value)
        if kind is bytes:
            return {"$bytes": b64encode(value).decode()}
        if kind in (list, tuple):
            items = self._encode_items(value, path)
            return items if kind is list else {"$tuple": items}
        if kind in (dict, OrderedDict, Counter):
            return self._encode_dict(value, path)
        if kind in TENSOR_TYPES:
            return self._encode_tensor(value, path)
        if isinstance(value, Tensor) and _is_plain_storage(value):
            with torch._C.DisableTorchFunctionSubclass():
                return self._encode_tensor(value.detach().as_subclass(Tensor), path)
        if kind is np.ndarray and value.dtype.kind in "biufc":
            return self._encode_array(value, path)
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return {"$scalar": value.tobytes().hex(), "dtype": value.dtype.str}
        if kind is np.ndarray or isinstance(value, np.generic):
            raise _refused(f"numpy values of dtype {value.dtype}", path)
        raise _refused(f"a {kind.__module__}.{kind.__qualname__}", path)

    def _encode_items(self, value: Sequence[Any], path: tuple[str, ...]) -> list[Any]:
        if set(map(type, value)) == {int} and min(value) in INT64 and max(value) in INT64:
            return list(value)  # fast for the 625 numbers of a random generator
        return [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]

    def _encode_dict(self, value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        kinds = set(map(type, value))
        if not kinds <= KEY_TYPES:
            key = next(key for key in value if type(key) not in KEY_TYPES)
            raise _refused(f"the key {key!r} of type {type(key).__qualname__}", path)
        items = [self.encode(item, (*path, str(key))) for key, item in value.items()]
        if type(value) is dict and kinds <= {str} and all(map(_is_plain_key, value)):
            return dict(zip(value, items, strict=True))
        rows = [[self.encode(key, path), item] for key, item in zip(value, items, strict=True)]
        if type(value) is OrderedDict:
            node: dict[str, Any] = {"$ordered": rows}
            if hasattr(value, "_metadata"):  # of nn.Module.state_dict: the modules' versions
                node["metadata"] = self.encode(value._metadata, (*path, "_metadata"))
            return node
        return {"$counter" if type(value) is Counter else "$dict": rows}

    def _encode_tensor(self, value: Tensor, path: tuple[str, ...]) -> Any:
        dtype = _dtype_name(value.dtype)
        unknown = value.is_quantized or value.is_meta or value.is_nested or dtype in UNCOPIED_DTYPES
        if value.layout != torch.strided or unknown:
            kind = f"a {dtype} tensor of layout {value.layout} on {value.device}"
            raise _refused(kind, path)
        shape = tuple(value.shape)
        source = value.detach() if value.requires_grad else value
        name = self._add(source, dtype, shape, value.nbytes, path)
        node: dict[str, Any] = {"$tensor": name, "dtype": dtype, "shape": list(shape)}
        order = _memory_order(value)
        return node if order is None else {**node, "order": order}

    def _encode_array(self, value: NDArray[Any], path: tuple[str, ...]) -> Any:
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        dtype = value.dtype.name if value.dtype.isnative else value.dtype.str
        name = self._add(flat, dtype, value.shape, value.nbytes, path)
        return {"$array": name, "dtype": value.dtype.str, "shape": list(value.shape)}

    def _add(
        self,
        source: Tensor | NDArray[np.uint8],
        dtype: str,
        shape: tuple[int, ...],
        nbytes: int,
        path: tuple[str, ...],
    ) -> str:
        """Append a tensor under a unique name in its file; return the name."""
        in_model = path[0] == MODEL_PART
        file = MODEL_FILE if in_model else TRAINING_FILE
        text = ".".join(path[1:] if in_model and len(path) > 1 else path)
        if not text.isascii():
            text = text.encode(errors="replace").decode()  # other readers require valid Unicode
        name = text
        count = 1
        while (file, name) in self._names or name == "__metadata__":
            count += 1
            name = f"{text}#{count}"
        self._names.add((file, name))
        if dtype in SAFETENSORS_DTYPES:
            placed = NamedTensor(file, name, SAFETENSORS_DTYPES[dtype], shape, nbytes, source)
        else:
            placed = NamedTensor(file, name, "U8", (nbytes,), nbytes, source)
        self.snapshot.tensors.append(placed)
        return name


def _is_plain_storage(tensor: Tensor) -> bool:
    """Return whether a subclass of Tensor stores its values like a plain tensor.

    Subclasses that override `__torch_dispatch__` (DTensor, quantized weights) may store them
    elsewhere; lazy ones have none yet.
    """
    dispatch = type(tensor).__torch_dispatch__
    return dispatch is Tensor.__torch_dispatch__ and not is_lazy(tensor)


def _refused(value: str, path: tuple[str, ...]) -> TypeError:
    return TypeError(
        f"checkpoint state at {'.'.join(path)}: {value} cannot be saved; allowed: {ALLOWED}"
    )


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_plain_key(key: str) -> bool:
    return key[:1] != "$" and _is_plain(key)


def _is_plain(text: str) -> bool:
    """Return whether text survives JSON: halves of surrogate pairs may join there."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _encode_str(text: str) -> Any:
    if _is_plain(text):
        return text
    return {"$str": b64encode(text.encode("utf-8", "surrogatepass")).decode()}


def _memory_order(tensor: Tensor) -> list[int] | None:
    """Return the dimensions, outermost in memory first, of a dense but permuted tensor.

    A channels-last tensor is restored as one: its kernels stay as fast.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    return order if tensor.permute(order).is_contiguous() else None
