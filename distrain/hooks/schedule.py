"""LRScheduler: step the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distrain.checks import wrong
from distrain.errors import ConfigError
from distrain.hooks.metric import check_metric
from distrain.optim.optimizer import representative_group
from distrain.scalar_names import LR
from distrain.schedule.warmup import WarmupLR
from distrain.trainer.hook import HookBase
from distrain.trainer.optimizers import ONLY

Schedules = TorchScheduler | Mapping[str, TorchScheduler]


class LRScheduler(HookBase):
    """Steps a schedule once per iteration, after the update, and puts `lr`.

    `LRScheduler(schedule)` and `LRScheduler(optimizer, scheduler)` are the same. `lr` is the rate
    of the most representative group (`optim.representative_group`). Schedules of several
    optimizers are given by name, and each step of them puts `NAME/lr`.

    torch's `ReduceLROnPlateau` steps once per new value of `metric` instead, the one at the end of
    training too. Then the hook comes after the evaluation (order 70).

    Args:
        optimizer: that of the schedule, or the schedule itself.
        scheduler: of distrain or torch; it steps once per iteration.
        schedule: another name of it.
        metric: of `ReduceLROnPlateau`: the name of an evaluation's result, as "eval/loss", or of
            another metric that `TrainerBase.report_metrics` gets on all ranks.
    """

    order = 20
    part = "schedule"

    def __init__(
        self,
        optimizer: Optimizer | Schedules | None = None,
        scheduler: TorchScheduler | None = None,
        *,
        schedule: Schedules | None = None,
        metric: str | None = None,
    ) -> None:
        given: list[Schedules] = [s for s in (scheduler, schedule) if s is not None]
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            given.append(optimizer)
        if len(given) != 1:
            raise ConfigError(
                f"LRScheduler: expected one schedule, got {len(given)}; "
                "LRScheduler(schedule) or LRScheduler(optimizer, scheduler)"
            )
        of = given[0]
        self.schedules = dict(of) if isinstance(of, Mapping) else {ONLY: of}
        if isinstance(optimizer, Optimizer) and self.schedules[ONLY].optimizer is not optimizer:
            raise ConfigError("LRScheduler: expected the optimizer of the scheduler")
        self._metric = _checked(metric, self.schedules)
        self._stepped_at = -1  # iterations done at the last step on a metric
        if metric is not None:
            self.order = 70
        self._groups = {
            name: representative_group(each.optimizer) for name, each in self.schedules.items()
        }

    def before_train(self) -> None:
        if self._metric is not None:
            key = f"hooks.{self.trainer.name_of(self)}.metric"
            check_metric(self.trainer, key, self._metric)

    def after_step(self) -> None:
        for name, schedule in self.schedules.items():
            lr = float(schedule.get_last_lr()[self._groups[name]])
            full_name = f"{name}/{LR}" if name else LR
            self.trainer.storage.put_scalar(full_name, lr, False, reduce="local")
            if not isinstance(schedule, ReduceLROnPlateau):
                schedule.step()
        if self._metric is not None:
            self._step_on(self._metric)

    def after_train(self) -> None:
        if self._metric is not None and self.trainer.error is None:
            self._step_on(self._metric)  # it counts where a run is extended later

    def _step_on(self, metric: str) -> None:
        value, done = self.trainer.reported_now(metric), self.trainer.iter_done
        if value is not None and self._stepped_at != done:
            self._stepped_at = done
            for schedule in self.schedules.values():
                if isinstance(schedule, ReduceLROnPlateau):
                    schedule.step(value)

    def state_dict(self) -> dict[str, Any]:
        states = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return states.get(ONLY, states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state[name] if name else state)
            if isinstance(schedule, WarmupLR):
                schedule.apply()  # the horizon may have changed


def _checked(metric: str | None, schedules: Mapping[str, TorchScheduler]) -> str | None:
    """Return the metric if a schedule waits for one.

    Raises:
        ConfigError: one of the two is given without the other.
    """
    waits = any(isinstance(each, ReduceLROnPlateau) for each in schedules.values())
    if waits == (metric is not None):
        return metric
    if metric is None:
        expected = "a metric for ReduceLROnPlateau; set hooks.schedule.metric=eval/loss"
    else:
        kind = type(next(iter(schedules.values()))).__name__
        expected = f"null for {kind}; only schedule=plateau waits for a metric"
    raise wrong("hooks.schedule.metric", metric, expected)
