"""How long a step takes."""

from __future__ import annotations

import time

from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer


class IterationTimer(HookBase):
    """Puts `perf/step_s`, the whole iteration with its hooks, and `perf/data_s`, waiting for data.

    Both are seconds, averaged over ranks; `storage.spread` tells the slowest rank. The time of an
    iteration is known when it is over, so it is put with the next one.
    """

    order = 10
    trainer: Trainer

    def before_train(self) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def after_step(self) -> None:
        """Put the times."""
        now = time.perf_counter()
        self.trainer.storage.put_scalar("perf/step_s", now - self._begin)
        self.trainer.storage.put_scalar("perf/data_s", self.trainer.data_s)
        self._begin = now
