"""Tells `benchmarks/startup.py` when a rank has done its first step, and how large it is."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from distrain import HookBase


def note_first_step() -> None:
    """Write the time of day and this rank's largest memory so far, in MB, to a file of its own."""
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    path = Path(os.environ["FIRST_STEP"], os.environ["RANK"])
    path.write_text(f"{time.time()} {memory_mb}")


class FirstStep(HookBase):
    """Notes the first step of a run."""

    def after_step(self) -> None:
        if self.trainer.iter_done == self.trainer.start_iter + 1:
            note_first_step()
