"""StopAt: a stop after given iterations, to be continued later."""

from __future__ import annotations

from collections.abc import Sequence

from distrain.checks import whole
from distrain.events.reduction import STOP_REQUESTED
from distrain.trainer.hook import HookBase


class StopAt(HookBase):
    """Stops a run after exactly these numbers of iterations: saved, exit code 75.

    The next start of the same command continues it to the next of them, and the last one to the
    end. `python -m distrain.tune` stops its runs so.

    Args:
        iterations: numbers of finished iterations, in any order.
    """

    order = 85  # after the evaluation and the checkpoint of the iteration

    def __init__(self, iterations: Sequence[int]) -> None:
        self._iterations = {whole("iterations", each, least=1) for each in iterations}

    def after_step(self) -> None:
        if self.trainer.iter_done in self._iterations:  # on all ranks in the same iteration
            self.trainer.reduction.stop = STOP_REQUESTED
