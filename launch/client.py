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

    QUEUED = "queued"
    """The job waits in the queue for its first attempt."""
    RUNNING = "running"
    """A process or a job trains."""
    PREEMPTED = "preempted"
    """Preempted, lost or out of time, and queued again: it continues by itself."""
    STOPPED = "stopped"
    """Stopped on request, state saved: `resume` continues it."""
    FINISHED = "finished"
    """All iterations are done."""
    FAILED = "failed"
    """Ended by an error."""
    UNREADABLE = "unreadable"
    """A file in the run folder is damaged or cannot be read."""
    DEAD = "dead"
    """No process and no job is left, and no end was recorded: killed, or its machine is lost."""


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
        """Request that a run saves its state and stops, and is not restarted.

        Args:
            run_dir: of the run.
            state: its current one.

        Returns:
            False if the run has no job; the process that holds its lock is signalled then.

        Raises:
            ConfigError: the job cannot be stopped from here.
        """
        return False

    def logs(self, run_dir: Path) -> list[Path]:
        """Return log files outside of RUN/logs, the most important first; they need not exist."""
        return []

    def job_id(self, run_dir: Path) -> str:
        """Return the id to show for a run's job, "" without one."""
        return ""
