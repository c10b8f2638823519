"""Base classes of the schedules: the warm-up, and a torch scheduler that is a function of t."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypedDict

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Unpack, override

from distrain.checks import number, one_of, whole

WARMUP_METHODS = ("constant", "linear")


class Warmup(TypedDict, total=False):
    """Keywords of every warm-up; `WarmupLR` has their meaning and their defaults."""

    warmup_factor: float
    warmup_iters: int
    warmup_method: str
    last_epoch: int


class WarmupLR(LRScheduler, ABC):
    """Base of the schedules: a warm-up times the `decay(t)` of a subclass.

    `warmup(t)` is 1 from `warmup_iters` on. Before that it is `warmup_factor` (constant), or, with
    a = t / warmup_iters, `warmup_factor * (1 - a) + a` (linear; Goyal et al. 2017, "Accurate, Large
    Minibatch SGD", section 2.2). Example: warmup_factor 0.1, warmup_iters 4, linear: 0.1, 0.325,
    0.55, 0.775, 1, 1, ...

    Differences from torch's schedulers: `state_dict` holds `last_epoch` alone, so that a longer
    horizon in the configuration counts; `get_last_lr` returns floats for tensor rates too, which
    are filled in place; `step` has no bookkeeping and no warnings about the order of calls.
    `SequentialLR` works. `ChainedScheduler` does not: each step sets the rate from the base rate.
    An argument out of range is a ConfigError.

    Args:
        optimizer: its groups' `initial_lr`, or else `lr`, are the base rates.
        warmup_factor: fraction of the base rate at t = 0, >= 0.
        warmup_iters: iterations until the warm-up ends; 0 for none.
        warmup_method: "linear" or "constant".
        last_epoch: as in torch: the updates made before, less one; -1 starts at 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        self.warmup_factor = number("warmup_factor", warmup_factor)
        self.warmup_iters = whole("warmup_iters", warmup_iters, least=0)
        self.warmup_method = one_of("warmup_method", warmup_method, WARMUP_METHODS)
        was_wrapped = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        super().__init__(optimizer, last_epoch)
        if not was_wrapped:  # the wrapper only serves the warnings that `step` leaves out
            del optimizer.step
        self.base_lrs = [float(base) for base in self.base_lrs]  # the only read-back of a tensor

    @abstractmethod
    def decay(self, t: int) -> float:
        """Return the factor of the schedule after t updates, without the warm-up."""

    def warmup(self, t: int) -> float:
        """Return the factor of the warm-up after t updates."""
        if t >= self.warmup_iters:
            return 1.0
        if self.warmup_method == "constant":
            return self.warmup_factor
        alpha = t / self.warmup_iters
        return self.warmup_factor * (1 - alpha) + alpha

    def lr_at(self, t: int) -> list[float]:
        """Return the learning rate per group after t updates; the schedule stays as it is."""
        t = max(t, 0)  # SequentialLR holds later schedules at -1
        warmup, decay = self.warmup(t), self.decay(t)
        return [float(base) * warmup * decay for base in self.base_lrs]

    @override
    def get_lr(self) -> list[float | Tensor]:
        return [*self.lr_at(self.last_epoch)]

    @override
    def step(self, epoch: int | None = None) -> None:
        """Count one update, or go to update `epoch`, and set the rates of all groups."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self.apply()

    def apply(self) -> None:
        """Set the rates of all groups for the current t, as after loading a state."""
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the number of updates, also from one of torch's schedulers.

        As in torch the optimizer is not touched: its own state holds the rates. Where the schedule
        has changed since, `apply` sets them at once and `step` one update later.
        """
        self.last_epoch = int(state_dict["last_epoch"])
        self._last_lr = self.get_lr()

    def _update_lr(self, epoch: int | None = None) -> None:
        self.step(epoch)  # SequentialLR calls this to start a schedule at 0


class HorizonLR(WarmupLR):
    """Base of the schedules that end at an iteration.

    Args:
        max_iters: the t at which the schedule ends, >= 1.
        optimizer, *warmup, **keywords: see `WarmupLR`.
    """

    def __init__(
        self, optimizer: Optimizer, max_iters: int, *warmup: Any, **keywords: Unpack[Warmup]
    ) -> None:
        self.max_iters = whole("max_iters", max_iters, least=1)
        super().__init__(optimizer, *warmup, **keywords)

    def progress(self, t: int) -> float:
        """Return t / max_iters, at most 1."""
        return min(t / self.max_iters, 1.0)
