"""The learning rate over iterations."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler

from distrain.hook import HookBase
from distrain.optim import representative_group
from distrain.warmup import WarmupLR


class LRScheduler(HookBase):
    """Steps a schedule once an iteration, after the update, and puts `lr`.

    The rate shown is that of the most representative group (`optim.representative_group`).

    Args:
        schedule: of ours or any of torch that steps once an iteration; None keeps the rates.
    """

    order = 20
    part = "schedule"

    def __init__(self, schedule: TorchScheduler) -> None:
        self.schedule = schedule
        self._group = representative_group(schedule.optimizer)

    def after_step(self) -> None:
        """Put the rate that this update used, and set the next one."""
        lr = float(self.schedule.get_last_lr()[self._group])
        self.trainer.storage.put_scalar("lr", lr, False, reduce="local")
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the schedule's state back, and with it the rate of the next update."""
        self.schedule.load_state_dict(state)
        if isinstance(self.schedule, WarmupLR):
            self.schedule.apply()  # the horizon may have changed
