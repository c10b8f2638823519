"""PeriodicHook: work that is done every `period` iterations and at the end of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

from distrain.checks import parsed_number
from distrain.durations import epochs, iterations
from distrain.events.reduction import STOP_REQUESTED
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase

Period = int | Fraction | str
"""In iterations, a fraction of them, or text in epochs before `in_iterations`."""


class PeriodicHook(HookBase, ABC):
    """Calls `run` every `period` iterations and once at the end of training.

    Args:
        period: in iterations, or text in epochs, as "0.5 epoch"; None runs at the end only.
    """

    def __init__(self, period: Period | None) -> None:
        self._period = None if period is None else checked_period(period)
        self._last_done = -1  # iterations done at the last run

    @abstractmethod
    def run(self) -> None:
        """Do the work."""

    def before_train(self) -> None:
        if self._period is not None:
            self._period = in_iterations(self, self._period)
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


def checked_period(period: Period) -> Period:
    """Return the period; ConfigError unless it is an int >= 1 or text in epochs."""
    number: Period = parsed_number(period)  # of text, as an environment variable gives it
    if epochs(number) is None:
        iterations("period", number, iters_per_epoch=None)
    return number


def in_iterations(hook: HookBase, period: Period) -> int | Fraction:
    """Return a hook's period in iterations, a fraction where it is given in epochs.

    Raises:
        ConfigError: in epochs, but the length of the data is unknown; names the hook's key.
    """
    if not isinstance(period, str):
        return period
    trainer = hook.trainer
    key = f"hooks.{trainer.name_of(hook)}.period"
    return iterations(key, period, iters_per_epoch=trainer.iters_per_epoch)


def is_due(trainer: TrainerBase, period: Period | None) -> bool:
    """Whether a period ends with this iteration; the last one's turn comes in `after_train`."""
    done = trainer.iter_done
    return period is not None and ends_period(done, period) and done != trainer.max_iter


def ends_period(done: int, period: Period) -> bool:
    """Whether a period ends with iteration number `done`, counted from 1.

    The n-th ends with the first iteration after which n periods are done. Example: 5/2 iterations:
    3, 5, 8, 10, ...
    """
    assert not isinstance(period, str), "in epochs: call in_iterations in before_train"
    # for an int: done % period == 0
    return done * period.denominator % period.numerator < period.denominator


def is_finished(trainer: TrainerBase) -> bool:
    """Whether training has come to its end; false for a run that is interrupted or has failed."""
    is_last = trainer.iter_done == trainer.max_iter
    ended = is_last or trainer.reduction.stop not in (0, STOP_REQUESTED)
    return trainer.error is None and ended
