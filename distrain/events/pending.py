"""Scalars recorded on this rank, one row per iteration, not reduced yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from distrain.events.history import Floats, Ints

Operation = Literal["mean", "sum", "max", "min", "local"]
OPERATIONS: tuple[str, ...] = get_args(Operation)

_DTYPE = attrgetter("dtype")


class ScalarKind(NamedTuple):
    """The settings of one scalar."""

    reduce: Operation  # over ranks
    smoothing_hint: bool  # whether writers may show a median over iterations
    is_loss: bool = False  # training stops if it is not finite on any rank


LOSS = ScalarKind("mean", smoothing_hint=True, is_loss=True)


@dataclass(slots=True)
class ScalarRow:
    """The scalars of one iteration; a name is in `floats` or in `tensors`."""

    iteration: int
    floats: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)  # positions in the concatenated blocks
    blocks: list[Tensor] = field(default_factory=list)  # detached, without aliases
    num_elements: int = 0  # of all blocks
    counts: dict[str, float] = field(default_factory=dict)  # weights in the mean, where given

    def __contains__(self, name: object) -> bool:
        return name in self.floats or name in self.tensors

    def is_empty(self) -> bool:
        """Return whether nothing was put."""
        return not self.floats and not self.tensors

    def put_float(self, name: str, value: float) -> None:
        """Put a float; an earlier value of the name is replaced."""
        self.floats[name] = value
        if self.tensors:
            self.tensors.pop(name, None)

    def put_block(self, block: Tensor, *names: str) -> None:
        """Put the elements of a tensor; earlier values of the names are replaced.

        Args:
            block: (num_names,), or () for one name; detached and without aliases.
            names: of its elements, in order.
        """
        begin = self.num_elements
        self.num_elements = begin + len(names)
        self.blocks.append(block)
        self.tensors.update(zip(names, range(begin, self.num_elements), strict=True))
        if self.floats:
            for name in self.floats.keys() & names:
                del self.floats[name]

    def read(self) -> dict[str, float]:
        """Return all values by name; tensors are read back."""
        elements = [value for block in self.blocks for value in block.flatten().tolist()]
        return self.floats | {name: float(elements[at]) for name, at in self.tensors.items()}


class RowGroup(NamedTuple):
    """R rows of one rank that hold the same n names, oldest first; `values` is (R, n)."""

    names: tuple[str, ...]
    rows: Sequence[ScalarRow]
    values: Floats


def group_rows(rows: Sequence[ScalarRow], host: Floats) -> list[RowGroup]:
    """Group rows by their names: in most windows that is one group, or two.

    Args:
        rows: of one rank.
        host: the concatenated elements of all their blocks.
    """
    bundles: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[ScalarRow, int]]] = {}
    begin = 0
    for row in rows:
        names = tuple(row.floats), tuple(row.tensors)
        bundles.setdefault(names, []).append((row, begin))
        begin += row.num_elements
    groups: list[RowGroup] = []
    for (floats, tensors), members in bundles.items():
        bundle, begins = zip(*members, strict=True)
        values = np.empty((len(bundle), len(floats) + len(tensors)))
        if floats:
            flat = chain.from_iterable(row.floats.values() for row in bundle)
            values[:, : len(floats)] = np.fromiter(
                flat, np.float64, len(bundle) * len(floats)
            ).reshape(len(bundle), -1)
        if tensors:
            places: Ints | list[list[int]] = np.arange(len(tensors), dtype=np.int64)
            if any(row.num_elements != len(tensors) for row in bundle):  # a name was put twice
                places = [list(row.tensors.values()) for row in bundle]
            values[:, len(floats) :] = host[np.array(begins)[:, None] + places]
        groups.append(RowGroup((*floats, *tensors), bundle, values))
    return groups


def detached_copy(name: str, value: Tensor) -> Tensor:
    """Copy a tensor on its device; ValueError if it has not exactly one element."""
    return _detached(name, value).clone()


def _detached(name: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a tensor with one element, not shape {[*value.shape]}")
    return value.detach()


def common_device(tensors: Iterable[Tensor]) -> torch.device:
    """Return a CUDA device if any tensor is on one, else the CPU."""
    # a non-blocking copy to the CPU could be read before it has arrived
    return next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))


def stack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Copy tensors into a detached (n,) tensor; ValueError if one has not exactly one element."""
    alike = list(tensors.values())
    if len(set(map(_DTYPE, alike))) == 1:
        with suppress(RuntimeError):  # several shapes or devices
            block = torch.stack(alike).detach()
            if block.numel() == len(alike):
                return block.flatten()
    device = common_device(alike)
    alike = [_detached(name, tensor).reshape(()) for name, tensor in tensors.items()]
    return torch.stack([t.to(device, torch.float64, non_blocking=True) for t in alike])


def flatten(blocks: Sequence[Tensor]) -> Tensor:
    """Copy the elements of all blocks into one float64 tensor on their device."""
    if len({block.dtype for block in blocks}) == len({block.device for block in blocks}) == 1:
        if len({block.shape for block in blocks}) == 1:
            return torch.stack(list(blocks)).to(torch.float64).flatten()
        return torch.cat([block.flatten() for block in blocks]).to(torch.float64)
    device = common_device(blocks)
    return torch.cat([b.flatten().to(device, torch.float64, non_blocking=True) for b in blocks])
