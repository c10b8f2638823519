"""Waits for jobs on SLURM: their states, what rank 0 prints, how the run ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from distrain.errors import ConfigError, ExitCode, RankFailed
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm.attempts import SLURM_FOLDER, Attempt, read_attempts, summary
from distrain.progress import waiting

POLL_S = 2.0
_PATIENCE_S = 60.0  # with a controller that does not answer, or a file system that is late


class LogTail:
    """Gives what was appended to a file since the last look; the file may come later.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> str:
        """Return the whole lines that are new."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._position:
                    self._position = 0  # it was begun anew
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return ""
        text = text[: text.rfind(b"\n") + 1]
        self._position += len(text)
        return text.decode(errors="replace")


class JobWatch:
    """Says what becomes of one job.

    Args:
        job_id: SLURM's.
        run_dir: the run folder.
    """

    def __init__(self, job_id: str, run_dir: Path) -> None:
        self.job_id = job_id
        self.run_dir = run_dir
        self._before = len(read_attempts(run_dir))
        self._status: slurm_queue.Status | None = None
        self._answered = time.monotonic()

    def change(self) -> str:
        """Ask SLURM; return one line about what changed, "" if nothing did."""
        old = self._status
        try:
            new = slurm_queue.status(self.job_id)
        except slurm_queue.QueueError as error:
            if time.monotonic() - self._answered > _PATIENCE_S:
                self._answered = time.monotonic()
                return f"job {self.job_id}: SLURM does not answer: {error}"
            return ""
        self._answered = time.monotonic()
        if new is None:
            # forgotten: it ended longer ago than SLURM keeps jobs
            new = slurm_queue.Status(self.job_id, "COMPLETED", "None", "", 0, 0, 0)
        self._status = new
        if old is not None and (old.state, old.restarts) == (new.state, new.restarts):
            return ""
        why = f" ({new.reason})" if new.reason not in ("None", "(null)") else ""
        where = f" on {new.nodes}" if new.state == "RUNNING" else ""
        again = f", requeued {new.restarts} times" if new.restarts else ""
        return f"job {self.job_id}: {new.state}{why}{where}{again}"

    def waits(self) -> str:
        """Return what the job waits for in the queue, "" once it is out of it."""
        status = self._status
        if status is None or status.state != "PENDING":
            return ""
        why = f" ({status.reason})" if status.reason not in ("None", "(null)") else ""
        return f"job {self.job_id} waits in the queue{why}"

    @property
    def ended(self) -> bool:
        """Whether the job is over, as of the last `change`."""
        return self._status is not None and self._status.ended

    def attempts(self) -> list[Attempt]:
        """Return what the job's attempts were."""
        return [a for a in read_attempts(self.run_dir)[self._before :] if a.job_id == self.job_id]

    def result(self) -> ExitCode:
        """Return how the run ended.

        Raises:
            ConfigError: the nodes do not see the run folder.
            RankFailed: the run failed.
        """
        assert self._status is not None
        status = self._status
        attempts = self.attempts()
        if not attempts and (status.exit_code == ExitCode.BAD_CONFIG or status.signal):
            where = status.nodes or "its nodes"
            raise ConfigError(
                f"run.dir={self.run_dir}: job {self.job_id} could not work there on {where}; the "
                "run folder must be on a file system that all nodes share"
            )
        if not attempts:
            if status.state == "CANCELLED":
                return ExitCode.STOPPED
            raise RankFailed(
                f"job {self.job_id} ended {status.state} ({status.reason}, exit code "
                f"{status.exit_code}) before anything ran; its output is in {self.run_dir}/slurm"
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
    """Show a job's state and what rank 0 prints until the job's end.

    An interrupt ends the following, not the job.

    Returns:
        FINISHED, or STOPPED where the run was stopped with its state saved and not requeued.

    Raises:
        RankFailed: the run failed; the text is the error of the rank that failed first.
        ConfigError: the nodes cannot work in the run folder.
    """
    watch = JobWatch(job_id, run_dir)
    # what task 0 and the batch script print; rank 0 keeps its agent's console
    log = LogTail(run_dir / SLURM_FOLDER / f"{job_id}_0_log.out")
    try:
        with waiting(watch.waits):
            while not watch.ended:
                change = watch.change()
                print(log.new_lines(), end="", flush=True)
                if change:
                    _say(change)
                if not watch.ended:
                    time.sleep(POLL_S)
    except KeyboardInterrupt:
        _say(f"job {job_id} goes on; `scancel {job_id}` stops it with its state saved")
        return ExitCode.STOPPED
    print(log.new_lines(), end="", flush=True)
    if watch.attempts():
        _say(summary(watch.attempts()))
    return watch.result()


def follow_all(runs: Mapping[str, Path]) -> ExitCode:
    """Show the states of jobs until all have ended, then a table of how.

    Args:
        runs: the run folder of each job id.

    Returns:
        FINISHED if all finished, else the code of the first that did not.
    """
    watches = [JobWatch(job_id, run_dir) for job_id, run_dir in runs.items()]

    def waits() -> str:
        waiting_jobs = [watch for watch in watches if watch.waits()]
        return f"{len(waiting_jobs)} of {len(watches)} jobs wait in the queue" * bool(waiting_jobs)

    try:
        with waiting(waits):
            while not all(watch.ended for watch in watches):
                for watch in watches:
                    if not watch.ended and (change := watch.change()):
                        _say(change)
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        _say("the jobs go on; `scancel` stops them with their state saved")
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
