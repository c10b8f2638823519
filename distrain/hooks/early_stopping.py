"""Ending a run that no longer gets better."""

from __future__ import annotations

from typing import Any, Literal

from distrain.errors import ConfigError
from distrain.hooks.metric import MetricHook


class EarlyStopping(MetricHook):
    """Ends training on all ranks when a metric has not improved for a while.

    The end is that of the period of `trainer.window` iterations in which this was found, so that
    a run that was interrupted stops where another does.

    Args:
        metric: the scalar's name, such as "eval/accuracy"; the same on all ranks or on any.
        patience: how many evaluations without improvement are borne.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: how much better counts as better.
    """

    order = 70
    only_closes = True

    def __init__(
        self,
        metric: str,
        *,
        patience: int,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
    ) -> None:
        if patience < 1:
            raise ConfigError(f"patience={patience}; it is at least 1 evaluation")
        super().__init__(metric, mode=mode, min_delta=min_delta)
        self._patience = patience
        self._num_bad = 0

    def after_step(self) -> None:
        """Look at the metric if it was put in this iteration."""
        if self._count() and self._num_bad >= self._patience:
            self.trainer.storage.early_stop = True

    def after_train(self) -> None:
        """Count the final evaluation, for a run that goes on later."""
        if self.trainer.error is None:
            self._count()
        super().after_train()

    def _count(self) -> bool:
        """Take the metric's value; return whether there is a new one."""
        value = self.new_value()
        if value is None:
            return False
        self._num_bad = 0 if self.is_best(value) else self._num_bad + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how long it is ago."""
        return {"best": self.best, "num_bad": self._num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.best, self._num_bad = state["best"], state["num_bad"]
