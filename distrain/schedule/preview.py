"""What a schedule will do, before it does it: the learning rate at given iterations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, zeros
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distrain.optim.optimizer import representative_group
from distrain.schedule.base import WarmupLR


def schedule_values(
    build: Callable[[Optimizer], LRScheduler],
    optimizer: Optimizer,
    iterations: Sequence[int],
    *,
    group: int | None = None,
    max_steps: int = 100_000,
) -> list[float]:
    """Return the learning rate that each of the iterations will use; the optimizer stays as it is.

    Ours are evaluated in closed form. Others step through on a stand-in without parameters.

    Args:
        build: makes the schedule for an optimizer, such as `config.build` with its node.
        optimizer: the run's optimizer, of which only the groups' settings are read.
        iterations: counted from 0, in any order.
        group: index of the group; None for the representative one.
        max_steps: how far a foreign schedule is stepped.

    Returns:
        one rate for each iteration; NaN where a foreign schedule needs more steps, or a metric.
    """
    index = representative_group(optimizer) if group is None else group
    schedule = build(_stand_in(optimizer))
    if isinstance(schedule, WarmupLR):
        return [schedule.lr_at(t)[index] for t in iterations]
    reach = 0 if isinstance(schedule, ReduceLROnPlateau) else max_steps
    last = max((t for t in iterations if t <= reach), default=0)
    groups = schedule.optimizer.param_groups
    rates = [float(groups[index]["lr"])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of")  # there is no update to make
        for _ in range(last):
            schedule.step()
            rates.append(float(groups[index]["lr"]))
    return [rates[t] if t <= reach else math.nan for t in iterations]


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the same groups and settings, and one number for parameters each."""
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
