"""Starting the ranks of a job, on this machine or elsewhere: processes, not training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from distrain.errors import ExitCode
from distrain.launch.client import JobClient

if TYPE_CHECKING:
    from distrain.launch.run_dir_handover import Handover


class Job(Protocol):
    """The work of every rank; picklable."""

    @property
    def run_dir(self) -> str:
        """Folder of the run; the ranks' logs go to `logs/` in it."""
        ...

    def __call__(self) -> ExitCode:
        """Run one rank: RANK, LOCAL_RANK, WORLD_SIZE, ... are in the environment.

        SIGTERM, SIGINT and SIGUSR2 are ignored until the job sets handlers; each requests a stop.
        """
        ...


class Launcher(ABC):
    """Base class of `launch._target_`; the other keys of `launch` are its keywords.

    Attributes:
        waits: whether `start` returns when the run has ended. False: it submits the run,
            `start_all` gets all runs of a sweep at once, and `client` reports on them.
        client: finds the job of a run in `python -m distrain.runs`; None: there are no jobs.
    """

    waits: ClassVar[bool] = True
    client: ClassVar[type[JobClient] | None] = None

    @property
    def owns_run(self) -> bool:
        """Whether this process writes the run folder; else it waits for the one that does."""
        return True

    @property
    def is_restart(self) -> bool:
        """Whether a program, not a user, has started the run again."""
        return False

    @property
    def handover(self) -> Handover | None:
        """Channel by which all processes that compose the configuration agree on a run folder."""
        return None

    @abstractmethod
    def start(self, job: Job) -> ExitCode:
        """Run a job to its end, or submit it.

        Raises:
            ConfigError: a mistake of the user, found by the launcher or by a rank.
            RankFailed: a rank failed; the text names it, its log and its error.
            NonFiniteLoss: all ranks stopped at a loss that is not finite.
        """

    def start_all(self, jobs: Sequence[Job]) -> ExitCode:
        """Start the runs of a sweep; return the first code that is not FINISHED."""
        codes = [self.start(job) for job in jobs]
        return next((code for code in codes if code != ExitCode.FINISHED), ExitCode.FINISHED)

    def plan(self, job: Job) -> str:
        """Return text on how `start` would start the ranks, for `plan=true`; "" prints nothing."""
        return ""
