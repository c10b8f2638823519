"""One attempt of a SLURM job: records of its nodes, stop requests, and how it ended.

Standard library only: the batch script and the submitting command import no torch.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError, ExitCode
from distrain.launch.failure import Failure, cause
from distrain.launch.slurm import queue
from distrain.runfolder.attempts import (
    JOB_FOLDER,
    SUBMITTED_FILE,
    Attempt,
    read_json,
    write_json,
)

_STOP_FILE = "stop.json"


@dataclass
class NodeRecord:
    """State of one node's agent, in RUN/slurm/JOB-RESTART/NODE.json."""

    node: str  # name
    code: int | None = None  # exit code of its ranks; None while they run
    signals: list[str] = field(default_factory=list)  # names of the signals that the agent received
    error: str = ""  # text for the user
    failure: dict[str, Any] | None = None  # fields of the causing `Failure`; None if no rank failed
    # seconds from the first signal until state was saved and all ranks had ended
    stop_s: float = 0.0

    def write(self, run_dir: Path) -> None:
        """Write the record completely; OSError if that fails."""
        folder = attempt_folder(run_dir)
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{self.node}.json", dataclasses.asdict(self))


def prepare(run_dir: Path, *, job_id: str | None = None) -> Path:
    """Make the private folder of a run for a new job, with the job's id once it is known.

    Raises:
        ConfigError: another job works on this run.
    """
    folder = run_dir / JOB_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # unpickling a file of this folder runs code
    refuse_other_job(run_dir, job_id=job_id)
    write_json(folder / SUBMITTED_FILE, {"job_id": job_id, "from": socket.gethostname()})
    return folder


def refuse_other_job(run_dir: Path, *, job_id: str | None = None) -> None:
    """Raise ConfigError if another job works on a run or waits to, or SLURM does not answer."""
    other = read_json(run_dir / JOB_FOLDER / SUBMITTED_FILE).get("job_id")
    if not other or other == job_id:
        return
    try:
        status = queue.status(other)
    except queue.QueueError as error:
        raise ConfigError(
            f"run.dir={run_dir}: unknown whether job {other} still works on this run ({error}); "
            f"if it has ended, remove {JOB_FOLDER}/{SUBMITTED_FILE} there"
        ) from error
    if status is not None and not status.ended:
        raise ConfigError(
            f"run.dir={run_dir}: job {other} ({status.state}) works on this run; wait for it, "
            f"`scancel {other}`, or give another run.name"
        )


def request_stop(run_dir: Path, job_id: str) -> None:
    """Request that a job ends with its state saved and is not requeued.

    Nodes read it when they start, the batch script at the end; ranks at work need `scancel
    --signal` too. A plain `scancel` would give them SLURM's KillWait only, 30 s.
    """
    write_json(run_dir / JOB_FOLDER / _STOP_FILE, {"job_id": job_id})


def is_stop_requested(run_dir: Path, job_id: str | None) -> bool:
    """Return whether `request_stop` was called for a job."""
    request = read_json(run_dir / JOB_FOLDER / _STOP_FILE)
    return bool(request) and request.get("job_id") == job_id


def clear_stop_request(run_dir: Path) -> None:
    """Remove the request when the job has ended, so that it can be requeued by hand."""
    (run_dir / JOB_FOLDER / _STOP_FILE).unlink(missing_ok=True)


def attempt_folder(run_dir: Path) -> Path:
    """Return the folder of this attempt's node records."""
    return run_dir / JOB_FOLDER / f"{queue.own_job_id()}-{queue.own_restarts()}"


def list_nodes(run_dir: Path) -> set[str]:
    """Return the names of the nodes of this attempt that have a record; opens no file."""
    try:
        names = os.listdir(attempt_folder(run_dir))
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def read_nodes(run_dir: Path) -> dict[str, NodeRecord]:
    """Return the node records of this attempt by node name."""
    records = (read_json(path) for path in sorted(attempt_folder(run_dir).glob("*.json")))
    return {fields["node"]: NodeRecord(**fields) for fields in records if fields}


def judge(
    nodes: dict[str, NodeRecord],
    expected: Sequence[str],
    step_exit: int,
    status: queue.Status | None,
) -> tuple[ExitCode, str, str]:
    """Return how an attempt ended: exit code, outcome, one line.

    Args:
        nodes: the node records that exist.
        expected: names of all nodes.
        step_exit: exit code of `srun`.
        status: of the job.
    """
    silent = [name for name in expected if name not in nodes or nodes[name].code is None]
    failed = [n for n in nodes.values() if n.code in (ExitCode.FAILED, ExitCode.BAD_CONFIG)]
    causes = [(Failure(**n.failure), n) for n in failed if n.failure is not None]
    first = failed[0] if failed else None
    is_of_peer = False
    if causes:
        found = cause(failure for failure, _ in causes)
        first = next(node for failure, node in causes if failure == found)
        is_of_peer = found.of_peer
    # a node that only lost its peer has not failed: the silent peer was lost
    if first is not None and not (is_of_peer and silent):
        return ExitCode(first.code or ExitCode.FAILED), "failed", first.error
    signals = sorted({f"{name} on {n.node}" for n in nodes.values() for name in n.signals})
    if not silent:
        if all(n.code == ExitCode.FINISHED for n in nodes.values()):
            return ExitCode.FINISHED, "finished", "all iterations are done"
        why = ", ".join(signals) or "trainer.max_time, a hook, or a signal to one rank"
        return ExitCode.STOPPED, "stopped", why
    if status is not None and status.reason == "TimeLimit":
        return ExitCode.FAILED, "lost", "the time limit came before the state was saved"
    if status is not None and status.state != "RUNNING":
        ended = "cancelled, preempted or requeued before the state was saved"
        return ExitCode.FAILED, "lost", ended
    never = [name for name in silent if name not in nodes]
    lost = f"no record from {', '.join(never or silent)} (srun returned {step_exit})"
    return ExitCode.FAILED, "lost", lost


def without_progress(attempts: Sequence[Attempt], job_id: str) -> int:
    """Return the number of a job's last attempts in a row without a newer checkpoint."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.job_id != job_id or attempt.kept_iter > attempt.first_iter:
            break
        count += 1
    return count
