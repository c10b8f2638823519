"""Follow SLURM jobs: their states, the output of rank 0, how the run ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distrain.errors import ConfigError, ExitCode, RankFailed
from distrain.launch.slurm import queue
from distrain.launch.slurm.client import log_name
from distrain.progress import waiting
from distrain.runfolder.attempts import JOB_FOLDER, Attempt, read_attempts, summary

POLL_S = 2.0
_PATIENCE_S = 60.0  # until a controller without an answer is reported
_NO_REASON = ("None", "(null)")


class LogTail:
    """Text appended to a file since the last read; the file may be created later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> str:
        """Return the complete new lines."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._position:
                    self._position = 0  # it was truncated
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return ""
        text = text[: text.rfind(b"\n") + 1]
        self._position += len(text)
        return text.decode(errors="replace")


class JobWatch:
    """State and result of one job."""

    def __init__(self, job_id: str, run_dir: Path) -> None:
        self.job_id = job_id
        self.run_dir = run_dir
        self._num_before = len(read_attempts(run_dir))
        self._status: queue.Status | None = None
        self._answered_s = time.monotonic()

    def change(self) -> str:
        """Ask SLURM; return one line about a change, "" without one."""
        old = self._status
        try:
            new = queue.status(self.job_id)
        except queue.QueueError as error:
            if time.monotonic() - self._answered_s > _PATIENCE_S:
                self._answered_s = time.monotonic()
                return f"job {self.job_id}: SLURM does not answer: {error}"
            return ""
        self._answered_s = time.monotonic()
        if new is None:  # it ended longer ago than SLURM keeps jobs
            new = queue.Status(self.job_id, "COMPLETED", "None", "", 0, 0, 0)
        self._status = new
        if old is not None and (old.state, old.restarts) == (new.state, new.restarts):
            return ""
        why = f" ({new.reason})" if new.reason not in _NO_REASON else ""
        nodes = f" on {new.nodes}" if new.state == "RUNNING" else ""
        requeues = f", requeued {new.restarts} times" if new.restarts else ""
        return f"job {self.job_id}: {new.state}{why}{nodes}{requeues}"

    def queue_reason(self) -> str:
        """Return why the job waits in the queue, "" when it does not."""
        status = self._status
        if status is None or status.state != "PENDING":
            return ""
        why = f" ({status.reason})" if status.reason not in _NO_REASON else ""
        return f"job {self.job_id} waits in the queue{why}"

    @property
    def ended(self) -> bool:
        """Whether the job had ended at the last `change`."""
        return self._status is not None and self._status.ended

    def attempts(self) -> list[Attempt]:
        """Return the job's ended attempts."""
        new = read_attempts(self.run_dir)[self._num_before :]
        return [attempt for attempt in new if attempt.job_id == self.job_id]

    def result(self) -> ExitCode:
        """Return how the run ended.

        Raises:
            ConfigError: the nodes do not see the run folder.
            RankFailed: the run failed.
        """
        assert self._status is not None
        status, attempts = self._status, self.attempts()
        if not attempts and (status.exit_code == ExitCode.BAD_CONFIG or status.signal):
            raise ConfigError(
                f"run.dir={self.run_dir}: job {self.job_id} could not work there on "
                f"{status.nodes or 'its nodes'}; the run folder must be on a file system that all "
                "nodes share"
            )
        if not attempts:
            if status.state == "CANCELLED":
                return ExitCode.STOPPED
            raise RankFailed(
                f"job {self.job_id} ended {status.state} ({status.reason}, exit code "
                f"{status.exit_code}) before a rank started; its output is in "
                f"{self.run_dir}/{JOB_FOLDER}"
            )
        last = attempts[-1]
        if last.outcome == "finished":
            return ExitCode.FINISHED
        if last.outcome == "stopped":
            return ExitCode.STOPPED
        if status.exit_code == ExitCode.BAD_CONFIG:
            raise ConfigError(last.why)
        raise RankFailed(last.why)


def follow(job_id: str, run_dir: Path) -> ExitCode:
    """Show a job's state and the output of rank 0 until the job's end.

    An interrupt ends the following, not the job.

    Returns:
        FINISHED, or STOPPED where the run was stopped with its state saved and not requeued.

    Raises:
        RankFailed: the run failed; the text is the error of the rank that failed first.
        ConfigError: the nodes cannot work in the run folder.
    """
    watch = JobWatch(job_id, run_dir)
    log = LogTail(run_dir / log_name(job_id))
    if not _await_end([watch], watch.queue_reason, log):
        _log(f"job {job_id} goes on; `scancel {job_id}` stops it with its state saved")
        return ExitCode.STOPPED
    print(log.new_lines(), end="", flush=True)
    if watch.attempts():
        _log(summary(watch.attempts()))
    return watch.result()


def follow_all(runs: Mapping[str, Path]) -> ExitCode:
    """Show the states of jobs, given with their run folders, until all have ended.

    Then print a table of results; return the first code that is not FINISHED.
    """
    watches = [JobWatch(job_id, run_dir) for job_id, run_dir in runs.items()]

    def num_waiting() -> str:
        number = sum(bool(watch.queue_reason()) for watch in watches)
        return f"{number} of {len(watches)} jobs wait in the queue" * bool(number)

    if not _await_end(watches, num_waiting):
        _log("the jobs go on; `scancel` stops them with their state saved")
        return ExitCode.STOPPED
    codes = []
    for watch in watches:
        why = ""
        try:
            code = watch.result()
        except (RankFailed, ConfigError) as error:
            code = ExitCode.BAD_CONFIG if isinstance(error, ConfigError) else ExitCode.FAILED
            lines = str(error).strip().splitlines()
            why = f"  {lines[-1]}" if lines else ""
        codes.append(code)
        print(f"{watch.job_id:12}  {code.name.lower():10}  {watch.run_dir.name}{why}", flush=True)
    return next((code for code in codes if code != ExitCode.FINISHED), ExitCode.FINISHED)


def _await_end(
    watches: Sequence[JobWatch], text: Callable[[], str], log: LogTail | None = None
) -> bool:
    """Print changes of jobs, and new lines of a log, until all have ended; False if interrupted."""
    try:
        with waiting(text):
            while not all(watch.ended for watch in watches):
                changes = [watch.change() for watch in watches if not watch.ended]
                if log is not None:
                    print(log.new_lines(), end="", flush=True)
                for change in filter(None, changes):
                    _log(change)
                if not all(watch.ended for watch in watches):
                    time.sleep(POLL_S)
    except KeyboardInterrupt:
        return False
    return True


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
