"""Lengths in epochs, converted to iterations once the data is built."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from distrain.durations import epochs, whole_iterations

Length = Callable[[], Fraction | None]


def in_iterations(conf: dict[str, Any], iters_per_epoch: Length) -> dict[str, Any]:
    """Return the configuration with `trainer.max_iter` and the schedule's lengths in iterations.

    Text such as "2 epochs" becomes an int, rounded up. Hooks convert their own periods.

    Args:
        conf: resolved configuration.
        iters_per_epoch: returns the exact length, None if unknown; called only for such text.

    Raises:
        ConfigError: the length of the data is unknown; names the key.
    """
    trainer, schedule = conf["trainer"], conf["schedule"]
    max_iter = _converted(trainer["max_iter"], "trainer.max_iter", iters_per_epoch)
    schedule = _converted(schedule, "schedule", iters_per_epoch)
    return {**conf, "trainer": {**trainer, "max_iter": max_iter}, "schedule": schedule}


def _converted(value: Any, key: str, iters_per_epoch: Length) -> Any:
    if isinstance(value, dict):
        return {k: _converted(v, f"{key}.{k}", iters_per_epoch) for k, v in value.items()}
    if isinstance(value, list):
        return [_converted(v, f"{key}.{i}", iters_per_epoch) for i, v in enumerate(value)]
    if epochs(value) is None:
        return value
    return whole_iterations(key, value, iters_per_epoch=iters_per_epoch())
