"""A hook that makes iterations last, so that a test can meet a run in its middle."""

import os
import time

from distrain.trainer.hook import HookBase


class Slow(HookBase):
    """Sleeps in each iteration of a job's first attempt, for the seconds that SLOW_S says."""

    def before_train(self) -> None:
        is_requeued = "SLURM_RESTART_COUNT" in os.environ
        self._seconds = 0.0 if is_requeued else float(os.environ.get("SLOW_S", "0"))

    def after_step(self) -> None:
        time.sleep(self._seconds)
