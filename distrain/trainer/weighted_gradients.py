"""Gradients of losses with weights: of sum(total) / sum(weight) over all forwards and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distrain.checks import did_you_mean, wrong
from distrain.distributed.collectives import gather_to_all, sum_over_ranks
from distrain.distributed.ranks import topology
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError
from distrain.log import logger
from distrain.trainer.loss import WeightedLosses, mean_of, nonzero, sum_of
from distrain.trainer.model_call import mean_losses

_PLAIN = ""  # key of the gradients of all losses without a weight

Backward = Callable[[Tensor, bool], object]
"""Backward of a () loss; the second argument keeps the graph for another one."""


class WeightedGradients:
    """Gradients of the weighted losses of one step, scaled when the sums of weights are known.

    These sums are known after the last forward: one small all-reduce on the device, without a
    read-back. The last backward takes them as factors; gradients of earlier forwards, which lie in
    `grad`, are multiplied. Until then these are of totals over the mean weight per rank of the
    first forward, which takes another all-reduce. With several names those of each are kept apart.
    A step with one forward and any number of names costs the one all-reduce alone.

    Args:
        strategy: averages gradients over ranks.
        parameters: whose gradients they are.
        num_forwards: A; losses without a weight count 1 / A each.
    """

    def __init__(
        self, strategy: Strategy, parameters: Sequence[Tensor], *, num_forwards: int
    ) -> None:
        self._strategy = strategy
        self._parameters = parameters
        self._num_forwards = num_forwards
        self._names: list[str] = []  # of all ranks, known after the first step
        self.clear()

    def clear(self) -> None:
        """Forget the losses of this step."""
        self._parts: list[WeightedLosses] = []
        self._divisors: dict[str, Tensor] = {}
        self._kept: dict[str, list[Tensor | None]] = {}
        self._in_grad: str | None = None  # whose gradients are in `grad`

    def add(
        self, losses: WeightedLosses, backward: Backward, *, retain_graph: bool = False
    ) -> None:
        """Accumulate the gradients of a forward. A collective in the first of a step.

        Args:
            losses: of the forward.
            backward: called for each name.
            retain_graph: keep the graph after the last of them, too.
        """
        if not self._parts:
            self._divisors = self._first_divisors(losses)
        self._parts.append(losses)
        terms: dict[str, Tensor] = {}
        for name, total in losses.totals.items():
            if name not in self._divisors:
                weight = torch.ones_like(losses.weights[name])
                self._divisors[name] = weight * self._num_forwards
            terms[name] = total / self._divisors[name].to(total.dtype)
        if losses.plain:
            terms[_PLAIN] = sum_of(losses.plain) / self._num_forwards
        # first the name whose gradients are in place
        ordered = sorted(terms, key=lambda name: name != self._in_grad)
        for name in ordered:
            self._select(name)
            backward(terms[name], retain_graph or name != ordered[-1])

    def _first_divisors(self, first: WeightedLosses) -> dict[str, Tensor]:
        """Return the divisor of each name that a rank has in the first forward. A collective."""
        # About the final one, so that float16 does not overflow, and the same on all ranks: the
        # backward of SyncBatchNorm or of a gather brings gradients from other ranks, and FSDP
        # reduces them before they are scaled.
        names = self._names or _names_of_all_ranks([first])
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(first.values())).device)
        weights = [first.weights.get(name, zero) for name in names]
        if not weights:
            return {}
        means = nonzero(sum_over_ranks(torch.stack(weights)) / topology().world_size)
        return dict(zip(names, means * self._num_forwards, strict=True))

    def _select(self, name: str) -> None:
        """Let `grad` of the parameters hold the gradients of one name."""
        if self._in_grad not in (None, name):
            assert self._in_grad is not None
            self._kept[self._in_grad] = [p.grad for p in self._parameters]
            gradients = self._kept.pop(name, [None] * len(self._parameters))
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
        self._in_grad = name

    def close(self, last: WeightedLosses | None = None) -> Tensor | None:
        """Scale the gradients; return the loss of the last forward, to call backward on.

        A collective. Multiplied by the number of ranks, as the strategy divides by it.

        Args:
            last: its losses, which were not added; None if all were.
        """
        if last is not None:
            self._parts.append(last)
        self._agree_on_names()
        device = next(iter(self._parts[0].values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        weights = [
            sum((part.weights[name] for part in self._parts if name in part.weights), start=zero)
            for name in self._names
        ]
        local = torch.stack([*weights, zero + sum(bool(part.plain) for part in self._parts)])
        self._local, total = local, sum_over_ranks(local)
        self._host = _HostCopy(torch.stack([local, total]))
        # NaN stays NaN: gradients and losses show it, as one that is not finite
        scales = torch.where(total == 0, zero, topology().world_size / nonzero(total))
        self._scales = dict(zip(self._names, scales, strict=False))
        self._combine()
        return None if last is None else self._scaled(last)

    def _scaled(self, losses: WeightedLosses) -> Tensor:
        terms = {
            name: total * self._scales[name].to(total.dtype)
            for name, total in losses.totals.items()
        }
        plain = {name: loss / self._num_forwards for name, loss in losses.plain.items()}
        return sum_of({**terms, **plain})

    @torch.no_grad()
    def _combine(self) -> None:
        """Scale the gradients of each name, and sum them."""
        if self._in_grad is None:
            return
        summed: list[Tensor | None] = [None] * len(self._parameters)
        for name in [self._in_grad, *self._kept]:
            self._select(name)
            gradients = [p.grad for p in self._parameters]
            if name != _PLAIN:
                factor = self._scales[name] * self._divisors[name]
                local = [self._strategy.local(g) for g in gradients if g is not None]
                if local:
                    torch._foreach_mul_(local, factor.to(local[0].dtype))
            for at, gradient in enumerate(gradients):
                before = summed[at]
                if before is None or gradient is None:
                    summed[at] = before if gradient is None else gradient
                else:
                    before.add_(gradient)
        for parameter, sum_ in zip(self._parameters, summed, strict=True):
            parameter.grad = sum_

    def _agree_on_names(self) -> None:
        """Collect the names of all ranks, once."""
        if not self._names:
            self._names = _names_of_all_ranks(self._parts)
        for name in _names(self._parts):
            if name not in self._names:
                raise ConfigError(
                    f"{name}: Loss with a new name: expected those of the first step "
                    f"({did_you_mean(name, self._names)}); return it from the first step on, with "
                    "weight 0 where it has no elements"
                )

    def finish(self) -> tuple[dict[str, Tensor], dict[str, float], bool]:
        """Return the values to record, after the last backward; ready for the next step.

        Waits for the copy of the weights to the host, which was queued before that backward.

        Returns:
            losses of this rank by name, their weights in the mean over ranks, and whether all
            weights of all ranks are 0.

        Raises:
            ConfigError: the weights of a name have a sum below 0; on all ranks.
        """
        local, total = self._host.read()
        for name, weight in zip(self._names, total, strict=False):  # the same on all ranks
            if weight < 0:
                raise wrong(f"{name}: Loss.weight", weight, "at least 0, summed over all ranks")
        # a mean without a weight would be left out, and with it the loss that is not finite
        weights = (1.0 if math.isnan(weight) else weight for weight in local)
        counts = dict(zip(self._names, weights, strict=False))
        losses: dict[str, Tensor] = {}
        for name, weight in zip(self._names, self._local, strict=False):  # on the device
            parts = [part for part in self._parts if name in part.totals]
            if parts:
                own = torch.stack([part.totals[name].detach() for part in parts]).sum()
                losses[name] = mean_of(own, weight)
        plain, rare = mean_losses([part.plain for part in self._parts])
        is_empty = not any(total)
        if "loss" not in losses:
            # the mean over ranks of these is the sum of all losses' means
            shares = torch.stack([self._scaled(part).detach() for part in self._parts]).sum()
            losses = {"loss": shares, **plain, **losses}
            counts |= {**rare, "loss": float(not is_empty)}
        self.clear()
        return losses, {name: counts[name] for name in losses if name in counts}, is_empty


def _names(parts: Sequence[WeightedLosses]) -> list[str]:
    """Return the names of losses with weights, in order of appearance."""
    return [*dict.fromkeys(name for part in parts for name in part.weights)]


def _names_of_all_ranks(parts: Sequence[WeightedLosses]) -> list[str]:
    """Return those of all ranks, sorted. A collective."""
    return sorted({name for names in gather_to_all(_names(parts)) for name in names})


class EmptyUpdates:
    """Report updates that are skipped because all weights are 0."""

    def __init__(self) -> None:
        self._was_empty = False

    def count(self, is_empty: bool, *, iteration: int) -> None:
        """Log the first of a row."""
        if is_empty and not self._was_empty:
            logger.warning(
                "the weights of all losses are 0 on all ranks at iteration %d: this update is "
                "skipped",
                iteration,
            )
        self._was_empty = is_empty


class _HostCopy:
    """Asynchronous copy of a tensor to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[list[float]]:
        """Return the values; waits for the copy alone."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[list[float]] = self._host.tolist()
        return values
