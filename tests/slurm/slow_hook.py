"""A hook that makes iterations last, so that a test can meet a run in its middle."""

import os
import time

from distrain.hook import HookBase


class Slow(HookBase):
    """Sleeps in each iteration, for the seconds that SLOW_S says."""

    def after_step(self) -> None:
        time.sleep(float(os.environ.get("SLOW_S", "0")))
