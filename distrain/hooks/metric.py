"""Base class of the hooks that decide on a metric."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Literal

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.hooks.callback import CallbackHook
from distrain.hooks.evaluation import EvalHook, is_finished
from distrain.log import logger
from distrain.trainer.hook import HookBase

_MAX_NAMES = 20  # in a warning


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

    def before_train(self) -> None:
        """Check that an evaluation gives the metric, if its name begins as those of one do.

        Where hooks of the user's own may put it, an unknown name is only logged. A collective if
        the name is unknown.

        Raises:
            ConfigError: no evaluation gives it; names those that there are.
        """
        of_evaluation = [
            hook
            for hook in self.trainer.hooks.values()
            if isinstance(hook, EvalHook)
            and any(self.metric.startswith(f"{prefix}/") for prefix in hook.prefixes())
        ]
        names: list[str] = []
        for hook in of_evaluation:
            found = hook.names()
            if found is not None and self.metric not in found:
                found = hook.names(all_batches=True)
            if found is None or self.metric in found:
                return
            names += found
        if not of_evaluation:
            return
        text = f"{self._key()}: no evaluation gives it; {did_you_mean(self.metric, names)}"
        if any(_is_users(hook) for hook in self.trainer.hooks.values()):
            logger.warning("%s", text)
        else:
            raise ConfigError(text)

    def after_train(self) -> None:
        """Log the names of the scalars there are if the metric never was among them."""
        trainer = self.trainer
        if self._seen is not None or not trainer.where.is_main or not is_finished(trainer):
            return
        names = [*trainer.storage.kinds]
        if self.metric not in names:
            nearest_first = get_close_matches(self.metric, names, n=_MAX_NAMES, cutoff=0.0)
            logger.warning(
                "%s: no such scalar was put in %d iterations; available: %s",
                self._key(),
                trainer.iter_done,
                ", ".join(nearest_first),
            )

    def _key(self) -> str:
        """Return the key of the configuration, with its value."""
        name = next(name for name, hook in self.trainer.hooks.items() if hook is self)
        return f"hooks.{name}.metric={self.metric}"

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


def _is_users(hook: HookBase) -> bool:
    """Whether a hook runs code of the user's, which may put any scalar."""
    return isinstance(hook, CallbackHook) or not type(hook).__module__.startswith("distrain.")
