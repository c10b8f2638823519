"""State of runs: by the client of their launcher, their lock and their files."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain.errors import ExitCode
from distrain.gpus.queue import announced
from distrain.gpus.shared_files import folder_path
from distrain.launch.client import ACTIVE, JobClient, JobStatus, State
from distrain.redact import masked_text
from distrain.runfolder import lock
from distrain.runs.records import Files, read

_SILENT_S = 900.0  # without a write, until a run whose launcher reports no state is called dead
_STATE_OF_CODE: dict[int, State] = {
    ExitCode.FINISHED: State.FINISHED,
    ExitCode.STOPPED: State.STOPPED,
}
_STATE_OF_OUTCOME = {"finished": State.FINISHED, "stopped": State.STOPPED, "lost": State.DEAD}


def statuses(runs: Sequence[Files]) -> tuple[list[tuple[Files, JobStatus]], str]:
    """Return each run with its status, and the notices of the clients: each is asked once.

    Runs that have ended since they were read are read again.
    """
    by_client: dict[type[JobClient], list[Files]] = {}
    for files in runs:
        if not files.unreadable and files.client is not None:
            by_client.setdefault(files.client, []).append(files)
    found: dict[Path, JobStatus] = {}
    notices = []
    for kind, of_kind in by_client.items():
        client = kind()
        found |= client.states([files.path for files in of_kind])
        notices += [client.notice] if client.notice else []
    return [_up_to_date(files, found.get(files.path)) for files in runs], "; ".join(notices)


def _up_to_date(files: Files, of_job: JobStatus | None) -> tuple[Files, JobStatus]:
    status = status_of(files, of_job)
    if status.state in ACTIVE or files.has_ended:
        return files, status
    # The end may have been recorded between the reads of the files and of the lock, which is freed
    # after it: without another read such a run would be called dead.
    files = read(files.path)
    return files, status_of(files, of_job)


def status_of(files: Files, of_job: JobStatus | None = None) -> JobStatus:
    """Return the status of one run; `of_job` is the answer of its client."""
    try:
        holder = lock.holder(files.path)
    except OSError as error:  # a process may hold it: the run is not called dead
        return JobStatus(State.UNREADABLE, f"lock: {error.strerror}")
    if files.unreadable and holder is None:
        return JobStatus(State.UNREADABLE, files.unreadable)
    if of_job is not None:
        lines = masked_text(of_job.why).strip().splitlines()
        return JobStatus(of_job.state, lines[0] if lines else "")
    if holder is not None:
        process = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        if _waits_for_gpus(holder):
            return JobStatus(State.QUEUED, f"{process} waits for idle GPUs")
        return JobStatus(State.RUNNING, process)
    return _by_files(files)


def _waits_for_gpus(holder: Mapping[str, Any]) -> bool:
    """Return whether the process that holds a run's lock waits in this machine's queue for GPUs."""
    is_here = holder.get("host") == socket.gethostname()
    return is_here and holder.get("pid") in announced(folder_path())


def _by_files(files: Files) -> JobStatus:
    """Return the status of a run without a known job, whose lock is free."""
    start = files.starts[-1] if files.starts else None
    attempt = files.attempts[-1] if files.attempts else None
    if start is not None and start.code is not None:
        return JobStatus(_STATE_OF_CODE.get(start.code, State.FAILED), start.why)
    if files.max_iter and files.kept_iter >= files.max_iter:
        return JobStatus(State.FINISHED)
    # attempts of a job before this start are history
    if attempt is not None and start is not None and attempt.end >= start.time:
        lines = attempt.why.splitlines()
        state = _STATE_OF_OUTCOME.get(attempt.outcome, State.FAILED)
        return JobStatus(state, lines[0] if lines else "")
    launcher = files.launcher
    # ranks of an unknown launcher, or of one that does not wait for them, need not hold the lock
    if launcher is None or (launcher.client is None and not launcher.waits):
        silent_s = max(0.0, time.time() - files.last_write_s())
        state = State.RUNNING if silent_s < _SILENT_S else State.DEAD
        return JobStatus(state, f"no write for {silent_s:.0f} s; its launcher reports no state")
    host = f" on {start.host}" if start is not None else ""
    return JobStatus(State.DEAD, f"its process{host} died without an exit record")
