"""The job that a launcher starts on every rank, and a requeue starts again."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from distrain.errors import ExitCode, RunFailed
from distrain.process.garbage import importing


@dataclass(frozen=True)
class TrainJob:
    """Training of one configuration. Picklable, and light: the ranks import torch.

    Attributes:
        conf: resolved configuration (see `config.keys.Keys`).
        run_dir: folder of the run; it continues from its newest valid checkpoint.
    """

    conf: dict[str, Any]
    run_dir: str

    def __call__(self) -> ExitCode:
        """Train as one rank, see `distrain.job.training.train`."""
        with importing():
            from distrain.job.training import train

            importlib.import_module("torch._dynamo")  # by each optimizer, when it is made

        try:
            return train(self.conf, self.run_dir)
        except OSError as error:  # of the run's folder, not a bug: one line
            if not str(error.filename).startswith(self.run_dir):
                raise
            raise RunFailed(f"{error.filename}: {error.strerror}") from error

    def plan(self) -> str:
        """Return a description of the run, see `distrain.job.plan.plan`."""
        from distrain.job.plan import plan

        return plan(self.conf, self.run_dir)
