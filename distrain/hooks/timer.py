"""IterationTimer: time per step, and time spent waiting for data."""

from __future__ import annotations

import time

from distrain.scalar_names import PERF, STEP_S
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer


class IterationTimer(HookBase):
    """Puts `perf/step_s`, the whole iteration with its hooks, and `perf/data_s`, waiting for data.

    Both are seconds, averaged over ranks; `storage.spread` has the slowest rank. The time of an
    iteration is known when it is over, so it is put with the next one.
    """

    order = 10
    trainer: Trainer

    def before_train(self) -> None:
        self._begin_s = time.perf_counter()

    def after_step(self) -> None:
        now_s = time.perf_counter()
        self.trainer.storage.put_scalar(STEP_S, now_s - self._begin_s)
        self.trainer.storage.put_scalar(f"{PERF}data_s", self.trainer.data_s)
        self._begin_s = now_s
