"""What a run is doing: told from its files, its lock, and one question to SLURM for all runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from distrain.errors import ExitCode
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm.attempts import SLURM_FOLDER, Attempt
from distrain.runfolder import lock as folderlock
from distrain.runs.records import Files


class State(StrEnum):
    """What a run is doing."""

    QUEUED = "queued"
    """Waits in SLURM's queue for its first attempt."""
    RUNNING = "running"
    """A process or a job works on it."""
    PREEMPTED = "preempted"
    """Preempted, lost or out of time, and back in the queue: it will go on by itself."""
    STOPPED = "stopped"
    """Stopped on request, its state saved: `resume` goes on."""
    FINISHED = "finished"
    """All iterations are done."""
    FAILED = "failed"
    """It ended by an error."""
    UNREADABLE = "unreadable"
    """A file in its folder is damaged, or not ours to read."""
    DEAD = "dead"
    """Nobody works on it, and nobody noted an end: killed, or its machine is gone."""


ACTIVE = (State.QUEUED, State.RUNNING, State.PREEMPTED)
"""States in which something still happens by itself."""

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")

Queue = dict[str, str]
"""SLURM's state of each job that it knows."""


def ask_slurm(job_ids: Iterable[str]) -> tuple[Queue | None, str]:
    """Return SLURM's states of jobs; those that it has forgotten are missing.

    Args:
        job_ids: an array's element as `12_3`.

    Returns:
        None and why, if SLURM does not answer; "" where there is no SLURM.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}, ""
    if shutil.which("squeue") is None:
        return None, ""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
    try:
        text = slurm_queue.run([*command, f"--jobs={','.join(wanted)}"])
    except slurm_queue.QueueError as error:
        if "Invalid job id" in str(error):  # it says so of a single one only
            return {}, ""
        return None, f"SLURM does not say what its jobs do: {error}"
    rows = (line.split() for line in text.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}, ""


def open_job(files: Files) -> str:
    """Return the SLURM job that may still be at work on a run, "" if none can be."""
    if not files.is_on_slurm or not files.submitted_id:
        return ""
    last = _last_attempt(files)
    is_over = last is not None and last.outcome in ("finished", "failed") and not files.running
    return "" if is_over else files.submitted_id


def state_of(files: Files, queue: Queue | None) -> tuple[State, str]:
    """Return what a run is doing, and one line about it.

    Args:
        files: of the run.
        queue: SLURM's states; None if SLURM could not be asked.
    """
    try:
        holder = folderlock.holder(files.path)
    except OSError as error:  # a process may hold it: the run is not called dead
        return State.UNREADABLE, f"lock: {error.strerror}"
    if files.unreadable and holder is None:
        return State.UNREADABLE, files.unreadable
    if files.is_on_slurm and files.submitted_id:
        return _on_slurm(files, queue)
    last = files.starts[-1] if files.starts else None
    if holder is not None:
        return State.RUNNING, f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    if last is not None and last.code is not None:
        return _STATE_OF.get(last.code, State.FAILED), last.why
    if files.max_iter and files.kept_iter >= files.max_iter:
        return State.FINISHED, ""
    where = f" on {last.host}" if last is not None else ""
    return State.DEAD, f"its process{where} is gone and has noted no end"


_STATE_OF: dict[int, State] = {
    ExitCode.FINISHED: State.FINISHED,
    ExitCode.STOPPED: State.STOPPED,
}


def _on_slurm(files: Files, queue: Queue | None) -> tuple[State, str]:
    job_id, last = files.submitted_id, _last_attempt(files)
    job = f"job {job_id}"
    said = None if queue is None else queue.get(job_id, "")
    if said is None:
        said = _guess(files, last)
        job = f"job {job_id} (by its files)"
    if said in _WAITING:
        began = last is not None or files.running is not None
        why = last.why if last is not None else "lost"
        return (State.PREEMPTED, _line(f"{job}: {why}")) if began else (State.QUEUED, job)
    if said and said not in slurm_queue.ENDED:
        return State.RUNNING, f"{job}: {said}"
    if files.running is not None and files.running.job_id == job_id:
        return State.DEAD, f"{job} is gone; attempt {files.running.attempt} has noted no end"
    if last is not None:
        outcome = {"finished": State.FINISHED, "stopped": State.STOPPED, "lost": State.DEAD}
        return outcome.get(last.outcome, State.FAILED), _line(last.why)
    if (files.path / SLURM_FOLDER / f"{job_id}_0_log.out").exists():
        return State.DEAD, f"{job} ended before anything ran; see {SLURM_FOLDER}/{job_id}_0_log.out"
    return State.STOPPED, f"{job} has left the queue before it began"


def _guess(files: Files, last: Attempt | None) -> str:
    """Return what SLURM may say of a job, going by the files."""
    if files.running is not None:
        return "RUNNING"
    return "PENDING" if last is None or last.requeued else "COMPLETED"


def _last_attempt(files: Files) -> Attempt | None:
    """Return the last attempt of the run's job that is over."""
    return next((a for a in reversed(files.attempts) if a.job_id == files.submitted_id), None)


def _line(text: Any) -> str:
    lines = str(text).strip().splitlines()
    return lines[0] if lines else ""
