"""SlurmClient: state, stop and logs of runs that are SLURM jobs, by one `squeue` for all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ConfigError
from distrain.launch.client import JobClient, JobStatus, State
from distrain.launch.slurm import queue
from distrain.launch.slurm.attempts import request_stop
from distrain.runfolder.attempts import (
    JOB_FOLDER,
    Attempt,
    read_attempts,
    read_job_id,
    read_running,
)

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
_STATE_OF = {"finished": State.FINISHED, "stopped": State.STOPPED, "lost": State.DEAD}


@dataclass(frozen=True)
class _Job:
    """Files of a run's job."""

    job_id: str  # of the job submitted last
    running: Attempt | None  # its attempt in progress
    last: Attempt | None  # its last ended attempt

    @property
    def is_open(self) -> bool:
        """Whether the job may still be in the queue."""
        is_over = self.last is not None and self.last.outcome in ("finished", "failed")
        return self.running is not None or not is_over


class SlurmClient(JobClient):
    """Client of launch=slurm and launch=allocation."""

    def states(self, run_dirs: Sequence[Path]) -> Mapping[Path, JobStatus]:
        jobs = _jobs(run_dirs)
        found = self._statuses(jobs)
        # An attempt may have ended, or begun, between the reads of its files and of SLURM's answer,
        # which do not fit together then: without its end it would be called dead.
        again = _jobs(run_dir for run_dir, job in jobs.items() if job.is_open)
        changed = {run_dir: job for run_dir, job in again.items() if job != jobs[run_dir]}
        return found | self._statuses(changed)

    def _statuses(self, jobs: Mapping[Path, _Job]) -> dict[Path, JobStatus]:
        known = self._squeue(job.job_id for job in jobs.values() if job.is_open)
        return {run_dir: _status(run_dir, job, known) for run_dir, job in jobs.items()}

    def stop(self, run_dir: Path, state: State) -> bool:
        job_id = read_job_id(run_dir)
        if not job_id:
            return False
        try:
            if state != State.RUNNING:
                queue.run(["scancel", job_id])
            else:
                request_stop(run_dir, job_id)  # first: a node that misses the signal reads it
                queue.run(["scancel", "--signal=USR2", job_id])
        except queue.QueueError as error:
            raise ConfigError(f"{run_dir}: job {job_id} cannot be stopped: {error}") from error
        except OSError as error:
            raise ConfigError(f"{run_dir}: cannot be written: {error.strerror}") from error
        return True

    def logs(self, run_dir: Path) -> list[Path]:
        job_id = read_job_id(run_dir)
        return [run_dir / log_name(job_id)] if job_id else []

    def _squeue(self, job_ids: Iterable[str]) -> Mapping[str, str] | None:
        """Return SLURM's states by job id, without jobs it has forgotten; None without SLURM."""
        wanted = sorted(set(job_ids))
        if not wanted:
            return {}
        if shutil.which("squeue") is None:
            return None
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
        try:
            text = queue.run([*command, f"--jobs={','.join(wanted)}"])
        except queue.QueueError as error:
            if "Invalid job id" in str(error):  # the answer for a single forgotten job
                return {}
            self.notice = f"SLURM does not answer: {error}"
            return None
        rows = (line.split() for line in text.splitlines())
        return {row[0]: row[1] for row in rows if len(row) == 2}


def log_name(job_id: str) -> str:
    """Return the path in a run folder of the output of task 0 and of the batch script."""
    return f"{JOB_FOLDER}/{job_id}_0_log.out"  # submitit's name


def _jobs(run_dirs: Iterable[Path]) -> dict[Path, _Job]:
    """Return the jobs of the runs that have one."""
    return {run_dir: job for run_dir in run_dirs if (job := _read(run_dir)) is not None}


def _read(run_dir: Path) -> _Job | None:
    job_id = read_job_id(run_dir)
    if not job_id:
        return None
    of_job = [each for each in read_attempts(run_dir) if each.job_id == job_id]
    return _Job(job_id, read_running(run_dir), of_job[-1] if of_job else None)


def _status(run_dir: Path, job: _Job, known: Mapping[str, str] | None) -> JobStatus:
    name, last, running = f"job {job.job_id}", job.last, job.running
    state = (known or {}).get(job.job_id, "")
    if known is None:  # judged by the files
        name += " (by its files)"
        is_queued = last is None or last.requeued
        state = "RUNNING" if running is not None else "PENDING" if is_queued else "COMPLETED"
    if state in _WAITING:
        if last is None and running is None:
            return JobStatus(State.QUEUED, name)
        return JobStatus(State.PREEMPTED, f"{name}: {last.why if last is not None else 'lost'}")
    if state and state not in queue.ENDED:
        return JobStatus(State.RUNNING, f"{name}: {state}")
    if running is not None and running.job_id == job.job_id:
        return JobStatus(State.DEAD, f"{name} has ended; attempt {running.attempt} recorded no end")
    if last is not None:
        return JobStatus(_STATE_OF.get(last.outcome, State.FAILED), last.why)
    log = log_name(job.job_id)
    if (run_dir / log).exists():
        return JobStatus(State.DEAD, f"{name} ended before a rank started; see {log}")
    return JobStatus(State.STOPPED, f"{name} left the queue before it started")
