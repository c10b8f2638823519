"""Preview of a schedule: the learning rate at given iterations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, zeros
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distrain.schedule.warmup import WarmupLR

_MAX_STEPS = 100_000  # of a schedule that has no closed form


def schedule_values(
    build: Callable[[Optimizer], LRScheduler],
    optimizer: Optimizer,
    iterations: Sequence[int],
    *,
    group: int = 0,
    max_steps: int = _MAX_STEPS,
) -> list[float]:
    """Return the learning rate at each iteration; the optimizer stays as it is.

    distrain's schedules are evaluated in closed form; others are stepped on a stand-in.

    Args:
        build: makes the schedule for an optimizer, such as `config.instantiate.build` with its
            node.
        optimizer: the run's optimizer; only the settings of its groups are read.
        iterations: counted from 0, in any order.
        group: index of the group.
        max_steps: steps at most of a schedule that is stepped.

    Returns:
        one rate per iteration; NaN where the schedule needs more steps, or a metric.
    """
    schedule = build(_stand_in(optimizer))
    if isinstance(schedule, WarmupLR):
        return [schedule.lr_at(t)[group] for t in iterations]
    reach = 0 if isinstance(schedule, ReduceLROnPlateau) else max_steps
    last = max((t for t in iterations if t <= reach), default=0)
    groups = schedule.optimizer.param_groups
    rates = [float(groups[group]["lr"])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of")  # no update is made
        for _ in range(last):
            schedule.step()
            rates.append(float(groups[group]["lr"]))
    return [rates[t] if t <= reach else math.nan for t in iterations]


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and settings, and one number as their parameters."""
    groups = []
    for group in optimizer.param_groups:
        settings = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        settings["lr"] = settings.get("initial_lr", settings["lr"])
        groups.append({**settings, "params": [zeros(1)]})
    return Optimizer(groups, dict(optimizer.defaults))
