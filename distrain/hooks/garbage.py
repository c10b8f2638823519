"""GarbageCollector: collect Python's garbage on all ranks after the same iterations."""

from __future__ import annotations

import gc

from distrain.hooks.periodic import Period, checked_period, ends_period, in_iterations
from distrain.trainer.hook import HookBase


class GarbageCollector(HookBase):
    """Turns Python's automatic collection off, and collects every `period` iterations.

    A collection stops a rank for milliseconds. Where each rank collects at its own time, all others
    wait for it in the next all-reduce; here the pauses of all ranks coincide. Objects that exist
    when training starts are frozen and not examined again. Memory of cycles that code makes in each
    step is held for up to `period` iterations.

    Args:
        period: in iterations, or text as "1 epoch".
    """

    order = 95
    only_closes = True

    def __init__(self, period: Period = 1000) -> None:
        self._period = checked_period(period)
        self._was_on = False
        self._has_frozen = False

    def before_train(self) -> None:
        self._period = in_iterations(self, self._period)
        self._was_on, self._has_frozen = gc.isenabled(), gc.get_freeze_count() == 0
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self) -> None:
        if ends_period(self.trainer.iter_done, self._period):
            gc.collect()

    def after_train(self) -> None:
        if self._was_on:
            gc.enable()
        if self._has_frozen:
            gc.unfreeze()
