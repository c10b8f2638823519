"""MetricHook: base class of the hooks that decide on a metric."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Literal

from distrain.checks import did_you_mean, one_of, wrong
from distrain.hooks.callback import CallbackHook
from distrain.hooks.evaluation import EvalHook
from distrain.hooks.periodic import is_finished
from distrain.log import logger
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase

_MAX_NAMES = 20  # in a warning


class MetricHook(HookBase):
    """Keeps the best value of a metric.

    The metric is the result of an evaluation (`TrainerBase.report_metrics`), or a scalar that this
    rank put in the same iteration.

    Args:
        metric: the scalar's name.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: smallest improvement that counts.
    """

    only_closes = True

    def __init__(self, metric: str, *, mode: Literal["max", "min"], min_delta: float) -> None:
        one_of("mode", mode, ("max", "min"))
        self.metric = metric
        self.best: float | None = None
        self._sign = 1.0 if mode == "max" else -1.0
        self._min_delta = min_delta
        self._seen: tuple[int, str] | None = None

    def before_train(self) -> None:
        """Check the name of the metric, see `check_metric`."""
        check_metric(self.trainer, self.key, self.metric)

    def after_train(self) -> None:
        trainer = self.trainer
        if self._seen is not None or not trainer.where.is_main or not is_finished(trainer):
            return
        names = [*trainer.storage.kinds]
        if self.metric not in names:
            logger.warning(
                "%s=%s: no such scalar was put in %d iterations; available: %s",
                self.key,
                self.metric,
                trainer.iter_done,
                ", ".join(get_close_matches(self.metric, names, n=_MAX_NAMES, cutoff=0.0)),
            )

    @property
    def key(self) -> str:
        """Key of `metric` in the configuration."""
        return f"hooks.{self.trainer.name_of(self)}.metric"

    def has_improved(self) -> bool | None:
        """Whether this iteration's value is the best so far; None without a new value."""
        value = self.trainer.metric_now(self.metric)
        seen = (self.trainer.iter_done, repr(value))
        if value is None or seen == self._seen:
            return None
        self._seen = seen
        if not math.isfinite(value):
            return False
        if self.best is not None and not (value - self.best) * self._sign > self._min_delta:
            return False
        self.best = value
        return True


def check_metric(trainer: TrainerBase, key: str, metric: str) -> None:
    """Check that an evaluation has a metric, if its name has the prefix of one.

    An unknown name is only logged where hooks of the user may put it. A collective if the name is
    unknown.

    Raises:
        ConfigError: no evaluation has it, and no hook of the user can put it.
    """
    evaluations = [
        hook
        for hook in trainer.hooks.values()
        if isinstance(hook, EvalHook)
        and metric.startswith(tuple(f"{prefix}/" for prefix in hook.prefixes()))
    ]
    if not evaluations or any(hook.has(metric) for hook in evaluations):
        return
    names = [name for hook in evaluations for name in hook.names()]
    error = wrong(key, metric, f"a metric of an evaluation; {did_you_mean(metric, names)}")
    if not any(_may_put_any_scalar(hook) for hook in trainer.hooks.values()):
        raise error
    logger.warning("%s", error)


def _may_put_any_scalar(hook: HookBase) -> bool:
    """Whether a hook runs code of the user."""
    return isinstance(hook, CallbackHook) or not type(hook).__module__.startswith("distrain.")
