"""Schedules and optimizers of a LightningModule, in any form that Lightning accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

SCHEDULE_KEYS = frozenset(
    ("scheduler", "name", "interval", "frequency", "reduce_on_plateau", "monitor", "strict")
)
"""Keys of Lightning's mapping of a schedule."""


class EveryNth:
    """A schedule that takes one step every `num` iterations.

    Args:
        schedule: any of torch.
        num: iterations per step of it.
        epoch_iters: the count starts again at each epoch of that many iterations, as Lightning's
            does for a `frequency` of steps; None counts over the whole run.
    """

    def __init__(self, schedule: LRScheduler, num: int, epoch_iters: int | None = None) -> None:
        self.optimizer = schedule.optimizer
        self._schedule = schedule
        self._num = num
        self._epoch_iters = epoch_iters
        self._done = 0

    def step(self) -> None:
        """Step the schedule in every `num`-th call."""
        before = self._done if self._epoch_iters is None else self._done % self._epoch_iters
        self._done += 1
        if (before + 1) % self._num == 0:
            self._schedule.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group."""
        return self._schedule.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, and the number of calls."""
        return {"schedule": self._schedule.state_dict(), "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self._done = state["done"]
        self._schedule.load_state_dict(state["schedule"])


class SteppedByModule:
    """Schedules of one optimizer that a module with manual optimization steps itself.

    `schedules` may hold those of other optimizers, too.
    """

    def __init__(self, optimizer: Optimizer, schedules: list[Any]) -> None:
        self.optimizer = optimizer
        self._schedules = [each for each in schedules if each.optimizer is optimizer]

    def step(self) -> None:
        """Do nothing: `self.lr_schedulers()` of the module are stepped by it."""

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the schedules."""
        return {"schedules": [each.state_dict() for each in self._schedules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        for schedule, saved in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)


def optimizers_and_schedules(configured: Any) -> tuple[list[Any], list[Any]]:
    """Return the optimizers, not checked, and the schedules from any form that Lightning accepts.

    A schedule may be the mapping of Lightning, with keys such as `interval`.
    """
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], list):
        optimizers, schedules = configured
        return optimizers, _listed(schedules)
    optimizers, schedules = [], []
    for each in _listed(configured):
        entry = each if isinstance(each, Mapping) else {"optimizer": each}
        optimizers += _listed(entry.get("optimizer"))
        schedules += _listed(entry.get("lr_scheduler", []))
    return optimizers, schedules


def _listed(value: Any) -> list[Any]:
    return [*value] if isinstance(value, list | tuple) else [value]
