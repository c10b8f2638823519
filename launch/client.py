"""JobClient: state, stop and logs of a submitted run, from another process or machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class State(str, Enum):
    """State of a run."""

    __str__ = str.__str__

    QUEUED = "queued"  # the job waits for its first attempt, or the command for idle GPUs
    RUNNING = "running"  # a process or a job trains
    PREEMPTED = "preempted"  # preempted, lost or out of time, and queued again
    STOPPED = "stopped"  # on request, state saved: `resume` continues it
    FINISHED = "finished"  # all iterations are done
    FAILED = "failed"  # ended by an error
    UNREADABLE = "unreadable"  # a file in the run folder is damaged or cannot be read
    DEAD = "dead"  # no process or job is left, and no end was recorded: killed, or machine lost


ACTIVE = (State.QUEUED, State.RUNNING, State.PREEMPTED)
"""States that change without a user."""


@dataclass(frozen=True)
class JobStatus:
    """State of a run by its job, and one line about it."""

    state: State
    why: str = ""


class JobClient(ABC):
    """State, stop and logs of the jobs of one kind of launcher: `Launcher.client`.

    `python -m distrain.runs` makes one per command, without arguments.

    Attributes:
        notice: warning after `states`, such as a scheduler that does not answer.
    """

    notice = ""

    @abstractmethod
    def states(self, run_dirs: Sequence[Path]) -> Mapping[Path, JobStatus]:
        """Return the status of each run whose job is known; called once for all runs of a table.

        The status of any other run follows from its lock and its files.
        """

    def stop(self, run_dir: Path, state: State) -> bool:
        """Request that a run, now in `state`, saves its state, stops and is not restarted.

        Returns:
            False if the run has no job; the process that holds its lock is signalled then.

        Raises:
            ConfigError: the job cannot be stopped from here.
        """
        return False

    def logs(self, run_dir: Path) -> list[Path]:
        """Return log files outside of RUN/logs, the most important first; they need not exist."""
        return []
