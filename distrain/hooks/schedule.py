"""LRScheduler: step the learning-rate schedule."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distrain.errors import ConfigError
from distrain.optim.optimizer import representative_group
from distrain.scalar_names import LR
from distrain.schedule.base import WarmupLR
from distrain.trainer.hook import HookBase


class LRScheduler(HookBase):
    """Steps a schedule once per iteration, after the update, and puts `lr`.

    `LRScheduler(schedule)` and `LRScheduler(optimizer, scheduler)` are the same. `lr` is the rate
    of the most representative group (`optim.representative_group`).

    Args:
        optimizer: that of the schedule, or the schedule itself.
        scheduler: of distrain or torch; it steps once per iteration.
        schedule: another name of it.
    """

    order = 20
    part = "schedule"

    def __init__(
        self,
        optimizer: Optimizer | TorchScheduler | None = None,
        scheduler: TorchScheduler | None = None,
        *,
        schedule: TorchScheduler | None = None,
    ) -> None:
        given = [s for s in (scheduler, schedule) if s is not None]
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            given.append(optimizer)
        if len(given) != 1:
            raise ConfigError(
                f"LRScheduler: expected one schedule, got {len(given)}; "
                "LRScheduler(schedule) or LRScheduler(optimizer, scheduler)"
            )
        self.schedule = given[0]
        if isinstance(self.schedule, ReduceLROnPlateau):
            raise ConfigError(
                "schedule=ReduceLROnPlateau: expected a schedule that depends on the iteration "
                "alone, not on a metric; take another, as schedule=cosine"
            )
        if isinstance(optimizer, Optimizer) and self.schedule.optimizer is not optimizer:
            raise ConfigError("LRScheduler: expected the optimizer of the scheduler")
        self._group = representative_group(self.schedule.optimizer)

    def after_step(self) -> None:
        lr = float(self.schedule.get_last_lr()[self._group])
        self.trainer.storage.put_scalar(LR, lr, False, reduce="local")
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)
        if isinstance(self.schedule, WarmupLR):
            self.schedule.apply()  # the horizon may have changed
