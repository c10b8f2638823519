"""Time limit of a training: stop all ranks with the state saved."""

from __future__ import annotations

import time
from collections.abc import Callable

from distrain.events.reduction import STOP_REQUESTED, ScalarReduction
from distrain.log import logger


def time_limit(reduction: ScalarReduction, max_time_s: float) -> Callable[[], None]:
    """Return a check for rank 0, called per step, that requests a stop after `max_time_s`.

    The request travels with the window's collective, so all ranks stop after the same iteration.
    """
    deadline_s = time.monotonic() + max_time_s

    def check() -> None:
        nonlocal deadline_s
        if time.monotonic() >= deadline_s:
            deadline_s = float("inf")
            reduction.stop_request = STOP_REQUESTED
            logger.info("trainer.max_time: %g s of training are over", max_time_s)

    return check
