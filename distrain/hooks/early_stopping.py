"""EarlyStopping: end a run whose metric no longer improves."""

from __future__ import annotations

from typing import Any, Literal

from distrain.checks import whole
from distrain.hooks.metric import MetricHook


class EarlyStopping(MetricHook):
    """Ends training on all ranks when a metric has not improved for `patience` evaluations.

    Training ends with the current period of `trainer.window` iterations, so that an interrupted
    and resumed run stops at the same iteration.

    Args:
        metric: the scalar's name, such as "eval/accuracy"; on all ranks or on any.
        patience: number of evaluations without improvement before stopping.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: smallest improvement that counts.
    """

    order = 70

    def __init__(
        self,
        metric: str,
        *,
        patience: int,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(metric, mode=mode, min_delta=min_delta)
        self._patience = whole("patience", patience, least=1)
        self._num_bad = 0

    def after_step(self) -> None:
        if self._count() and self._num_bad >= self._patience:
            self.trainer.storage.early_stop = True

    def after_train(self) -> None:
        # the final evaluation counts where a run is extended later
        if self.trainer.error is None:
            self._count()
        super().after_train()

    def _count(self) -> bool:
        """Count evaluations without improvement; return whether there is a new one."""
        improved = self.has_improved()
        if improved is None:
            return False
        self._num_bad = 0 if improved else self._num_bad + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_bad": self._num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._num_bad = state["best"], state["num_bad"]
