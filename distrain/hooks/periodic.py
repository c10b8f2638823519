"""PeriodicHook: work that is done every `period` iterations and at the end of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from distrain.checks import whole
from distrain.events.reduction import STOP_REQUESTED
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase


class PeriodicHook(HookBase, ABC):
    """Calls `run` every `period` iterations and once at the end of training.

    Args:
        period: in iterations; None runs at the end only.
    """

    def __init__(self, period: int | None) -> None:
        self._period = checked_period(period)
        self._last_done = -1  # iterations done at the last run

    @abstractmethod
    def run(self) -> None:
        """Do the work."""

    def before_train(self) -> None:
        self.is_idle = self._period is None

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            self._run()

    def after_train(self) -> None:
        is_run = self._last_done == self.trainer.iter_done  # by an earlier start
        if not self.only_closes and not is_run and is_finished(self.trainer):
            self._run()

    def _run(self) -> None:
        self.run()
        self._last_done = self.trainer.iter_done

    def state_dict(self) -> dict[str, Any]:
        return {"last_done": self._last_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_done = state["last_done"]


def checked_period(period: int | None) -> int | None:
    """Return the period in iterations, checked; None stands for the end only."""
    return None if period is None else whole("period", period, least=1)


def is_due(trainer: TrainerBase, period: int | None) -> bool:
    """Whether a period ends with this iteration; the last one's turn comes in `after_train`."""
    done = trainer.iter_done
    return period is not None and done % period == 0 and done != trainer.max_iter


def is_finished(trainer: TrainerBase) -> bool:
    """Whether training has come to its end; false for a run that is interrupted or has failed."""
    is_last = trainer.iter_done == trainer.max_iter
    ended = is_last or trainer.reduction.stop not in (0, STOP_REQUESTED)
    return trainer.error is None and ended
