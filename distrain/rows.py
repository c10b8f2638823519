"""What one rank puts in one iteration, before it is combined over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Operation = Literal["mean", "sum", "max", "min", "local"]
OPERATIONS: tuple[str, ...] = get_args(Operation)


class ScalarKind(NamedTuple):
    """How one scalar is treated.

    Attributes:
        reduce: its operation over ranks.
        smoothing_hint: whether writers may show a median over iterations.
        is_loss: whether training stops when it is not finite on any rank.
    """

    reduce: Operation
    smoothing_hint: bool
    is_loss: bool = False


LOSS = ScalarKind("mean", smoothing_hint=True, is_loss=True)


@dataclass(slots=True)
class ScalarRow:
    """The scalars of one iteration; a name is in `floats` or in `tensors`.

    Attributes:
        iteration: the iteration.
        floats: by name.
        tensors: by name, `(block, position)`: one element of a detached tensor that is our own.
        blocks: the tensors that `tensors` points into, in the order in which they were put.
        counts: by name, the weight in the mean where one was given.
    """

    iteration: int
    floats: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    blocks: list[Tensor] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.floats or name in self.tensors

    def is_empty(self) -> bool:
        """Whether nothing was put."""
        return not self.floats and not self.tensors

    def put_float(self, name: str, value: float) -> None:
        """Put a float; it takes the place of what had the name."""
        self.floats[name] = value
        if self.tensors:
            self.tensors.pop(name, None)

    def put_block(self, block: Tensor, *names: str) -> None:
        """Put the elements of a tensor; they take the place of what had the names.

        Args:
            block: (num_names,), or () for one name; detached, and nobody else's.
            names: of its elements, in order.
        """
        self.blocks.append(block)
        for position, name in enumerate(names):
            self.tensors[name] = (block, position)
            if self.floats:
                self.floats.pop(name, None)

    def read(self) -> dict[str, float]:
        """Return all values by name; tensors are read back for it."""
        return self.floats | {
            name: float(block.flatten()[position])
            for name, (block, position) in self.tensors.items()
        }


def own_copy(name: str, value: Tensor) -> Tensor:
    """Copy a tensor of one element into a detached tensor of its shape on its device.

    Raises:
        ValueError: it has more elements, or none.
    """
    if value.numel() != 1:
        raise ValueError(f"{name}: a scalar has one element, not shape {[*value.shape]}")
    return value.detach().clone()


def stack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Copy tensors of one element into a detached (n,) tensor; one operation if they are alike.

    Raises:
        ValueError: one has more elements, or none.
    """
    first = next(iter(tensors.values()))
    alike = [t if not t.dim() else own_copy(name, t).reshape(()) for name, t in tensors.items()]
    if any(t.dtype != first.dtype or t.device != first.device for t in alike):
        alike = [t.to(first.device, torch.float64, non_blocking=True) for t in alike]
    with torch.no_grad():
        return torch.stack(alike)
