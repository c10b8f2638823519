"""Python's garbage collected by all ranks after the same iterations."""

from __future__ import annotations

import gc

from distrain.errors import ConfigError
from distrain.trainer.hook import HookBase


class GarbageCollector(HookBase):
    """Turns Python's automatic collection off, and collects every so many iterations.

    A collection stops a rank for milliseconds, and where each rank has its own moment all others
    wait for it in the next all_reduce, so that many ranks lose as many pauses. Here all take theirs
    together. What is there when training starts is frozen and not looked through again. Memory of
    cycles that code makes in each step is held for up to `period` iterations.

    Args:
        period: in iterations.

    Raises:
        ConfigError: the period is too small.
    """

    order = 95
    only_closes = True

    def __init__(self, period: int = 1000) -> None:
        if period < 1:
            raise ConfigError(f"period={period}; it is at least 1 iteration")
        self._period = period
        self._was_on = False
        self._has_frozen = False

    def before_train(self) -> None:
        """Collect what the set-up has left, and turn automatic collection off."""
        self._was_on, self._has_frozen = gc.isenabled(), gc.get_freeze_count() == 0
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self) -> None:
        """Collect if it is time."""
        if self.trainer.iter_done % self._period == 0:
            gc.collect()

    def after_train(self) -> None:
        """Leave things as they were."""
        if self._was_on:
            gc.enable()
        if self._has_frozen:
            gc.unfreeze()
