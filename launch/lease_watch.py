"""Watch of a run's leases: restore removed files, and step aside for other runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from distrain.errors import ConfigError
from distrain.gpus import queue
from distrain.gpus.leases import Leases
from distrain.gpus.shared_files import folder
from distrain.log import report

_PATIENCE_S = 1.0  # for the mutex: the agent that calls the watch monitors the ranks, too


class LeaseWatch:
    """Whether another run needs the GPUs of a nice one; restores the leases of any run.

    Two looks in a row have to agree: the memory of a run that has just ended is freed with a delay.

    Args:
        leases: of the run.
        uses: returns `uses_of` for all GPUs of the machine.
        period_s: minimum time between two looks.
    """

    def __init__(
        self, leases: Leases, uses: Callable[[], Mapping[str, str]], period_s: float
    ) -> None:
        self._leases = leases
        self._uses = uses
        self._period_s = period_s
        self._next_s = 0.0
        self._num_looks = 0
        self._logged = ""

    def __call__(self) -> bool:
        """Return whether the ranks have to stop; called often."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._period_s
        claim, rival = self._leases.claim, None
        try:
            self._leases.restore(_PATIENCE_S)
            if claim.nice and queue.rivals(folder(), claim, _PATIENCE_S):
                rival = queue.steps_aside(folder(), claim, self._uses(), _PATIENCE_S)
        except ConfigError as error:  # must not end a run that trains
            if str(error) != self._logged:
                self._logged = str(error)
                report(f"{error}; the run goes on")
        self._num_looks = self._num_looks + 1 if rival else 0
        if rival is None or self._num_looks < 2:
            return False
        report(f"stepping aside for {rival.text()}: the ranks save their state and stop")
        return True
