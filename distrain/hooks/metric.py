"""Base class of the hooks that decide on a metric."""

from __future__ import annotations

import math
from typing import Literal

from distrain.errors import ConfigError
from distrain.hook import HookBase


class MetricHook(HookBase):
    """Finds out whether a metric is better than ever before.

    The metric is the result of an evaluation (`TrainerBase.report_metrics`), or a scalar that this
    rank put in the same iteration.

    Args:
        metric: the scalar's name.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: how much better it has to be.
    """

    def __init__(self, metric: str, *, mode: Literal["max", "min"], min_delta: float) -> None:
        if mode not in ("max", "min"):
            raise ConfigError(f"mode={mode!r}; choose max or min")
        self.metric = metric
        self.best: float | None = None
        self._sign = 1.0 if mode == "max" else -1.0
        self._min_delta = min_delta
        self._seen: tuple[int, str] | None = None

    def new_value(self) -> float | None:
        """Return the metric's value of this iteration once, None if there is none."""
        value = self.trainer.metric_now(self.metric)
        seen = (self.trainer.iter_done, repr(value))
        if value is None or seen == self._seen:
            return None
        self._seen = seen
        return value

    def is_best(self, value: float) -> bool:
        """Take a new value; return whether it is the best so far (NaN and infinity never are)."""
        if not math.isfinite(value):
            return False
        if self.best is not None and not (value - self.best) * self._sign > self._min_delta:
            return False
        self.best = value
        return True
