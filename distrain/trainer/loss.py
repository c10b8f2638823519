"""Loss: a loss with its weight, for means over tokens or boxes instead of batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distrain.checks import number
from distrain.errors import ConfigError


class Loss(NamedTuple):  # a tuple: DDP and FSDP find the tensors in a model's output
    """A loss that is the mean over `weight` elements: the gradient is of sum(total) / sum(weight).

    Both sums are over all forwards of a step and all ranks, so that each element counts alike,
    however they are spread. A model returns one, or several by name alongside plain losses::

        total = cross_entropy(logits, targets, reduction="sum")
        return distrain.Loss(total, weight=len(targets))

    Args:
        total: () sum over the elements.
        weight: their number, or the sum of their weights; 0 where there are none. A tensor is not
            read back from its device.
    """

    total: Tensor
    weight: Tensor | float


class WeightedLosses(dict[str, Tensor]):
    """Losses of one forward by name, each total over its weight; "loss" is their sum.

    Args:
        output: losses by name, some of them a `Loss`; without "loss", or with it alone.

    Attributes:
        plain: losses without a weight.
        totals: () of each `Loss`.
        weights: () float64 of each `Loss`, on the device of its total.

    Raises:
        ConfigError: a total or a weight is not one number.
    """

    def __init__(self, output: Mapping[str, Tensor | Loss]) -> None:
        self.plain: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for name, loss in output.items():
            if isinstance(loss, Loss):
                self.totals[name], self.weights[name] = _checked(name, loss)
            else:
                self.plain[name] = loss.reshape(())
        means = {name: mean_of(total, self.weights[name]) for name, total in self.totals.items()}
        parts = {**self.plain, **means}
        if parts and "loss" not in parts:
            parts = {"loss": sum_of(parts), **parts}
        super().__init__(parts)


def mean_of(total: Tensor, weight: Tensor) -> Tensor:
    """Return total / weight; the total where the weight is 0. Nothing is read back."""
    return total / nonzero(weight).to(total.dtype)


def nonzero(weight: Tensor) -> Tensor:
    """Return the weight, or 1 where it is 0. Example: 3 -> 3, 0 -> 1."""
    return torch.where(weight == 0, torch.ones_like(weight), weight)


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the () sum of losses."""
    return torch.stack([loss.reshape(()) for loss in losses.values()]).sum()


def _checked(name: str, loss: Loss) -> tuple[Tensor, Tensor]:
    total, weight = loss
    if not isinstance(total, Tensor) or total.numel() != 1:
        kind = f"shape {[*total.shape]}" if isinstance(total, Tensor) else type(total).__name__
        raise ConfigError(f"{name}: Loss.total={kind}: expected a tensor with one element; sum it")
    if not isinstance(weight, Tensor):
        weight = float(number(f"{name}: Loss.weight", weight))
        return total.reshape(()), total.detach().new_full((), weight, dtype=torch.float64)
    if weight.numel() != 1:
        raise ConfigError(
            f"{name}: Loss.weight=shape {[*weight.shape]}: expected one element; sum it"
        )
    weight = weight.detach().reshape(())
    return total.reshape(()), weight.to(total.device, torch.float64, non_blocking=True)


def unweighted(losses: Mapping[str, Tensor]) -> WeightedLosses:
    """Return losses of a forward without a `Loss`, as `total_loss` returned them."""
    parts = {name: loss for name, loss in losses.items() if name != "loss"}
    return WeightedLosses(parts or losses)


def check_first(losses: Mapping[str, Tensor], *, has_run: bool) -> None:
    """Raise ConfigError if the first `Loss` is not in the first forward: ranks expect it there."""
    if has_run:
        raise ConfigError(
            f"the model's forward returned a distrain.Loss among {', '.join(losses)}: expected one "
            "in each forward, or in none; return weight 0 where it has no elements"
        )
