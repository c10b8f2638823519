"""Processes, not training: what starts the ranks of a job, here or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from distrain.errors import ExitCode


class Job(Protocol):
    """What a launcher runs on every rank; picklable.

    Attributes:
        run_dir: folder of the run; the ranks' logs go to `logs/` in it.
    """

    @property
    def run_dir(self) -> str:
        """Folder of the run."""
        ...

    def __call__(self) -> ExitCode:
        """Do what one rank does: RANK, LOCAL_RANK, WORLD_SIZE, ... in the environment name it.

        SIGTERM, SIGINT and SIGUSR2 are ignored until the job sets handlers; each asks it to stop.
        """
        ...


class Launcher(Protocol):
    """What `launch._target_` names.

    A launcher that does not wait for its jobs may have `start_all(jobs) -> ExitCode` too: a sweep
    then hands it all its jobs at once. With `plan(job) -> str` it says what it would do. One whose
    `owns_run` is false leaves the run folder to another process.
    """

    def start(self, job: Job) -> ExitCode:
        """Run a job to its end, or hand it over.

        Raises:
            ConfigError: a mistake of the user, which the launcher or a rank found.
            RankFailed: a rank failed; the text names it, its log and its error.
            NonFiniteLoss: all ranks stopped at a loss that is not finite.
        """
        ...


def start(job: Job, launch: Mapping[str, Any]) -> ExitCode:
    """Run a job with the launcher that a configuration's `launch` node names; see `Launcher`."""
    from distrain.config.compose import build

    launcher: Launcher = build(launch, "launch")
    return launcher.start(job)
