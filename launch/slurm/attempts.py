"""The attempts of a run on SLURM: what each did, why it ended, what got lost between them.

Standard library only: the batch script and the submitting command do without torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError, ExitCode
from distrain.files import atomic
from distrain.files.regular import read_regular
from distrain.launch.failure import Failure, cause
from distrain.launch.slurm import queue as slurm_queue
from distrain.run_layout import ATTEMPTS_FILE

SLURM_FOLDER = "slurm"
SUBMITTED_FILE = "submitted.json"
RUNNING_FILE = "running.json"
"""The attempt that has begun, as long as it has noted no end."""

_STOP_FILE = "stop.json"
_MAX_BYTES = 16 << 20  # of a file of these


@dataclass(frozen=True)
class Attempt:
    """One start of the job and how it ended; a line of RUN/attempts.jsonl.

    Attributes:
        attempt: counts the starts of the run from 1.
        job_id: SLURM's, an array's element as `12_3`.
        restart: how often that job had been requeued before.
        nodes: their names.
        start: in seconds since 1970.
        end: in seconds since 1970.
        outcome: finished, stopped (with its state saved), failed, or lost (a node, a kill).
        why: one line about it.
        first_iter: iterations that were done at the start.
        last_iter: iterations that were done at the end, as far as metrics.jsonl and the
            checkpoints tell.
        kept_iter: of these, what the newest checkpoint holds; the rest has to be done again.
        step_s: mean time of an iteration, 0 if nobody measured it.
        stop_s: from the signal until the state was saved and the ranks were gone, 0 without one.
        requeued: whether the job went back into the queue on our request.
    """

    attempt: int
    job_id: str
    restart: int
    nodes: list[str]
    start: float
    end: float = 0.0
    outcome: str = ""
    why: str = ""
    first_iter: int = 0
    last_iter: int = 0
    kept_iter: int = 0
    step_s: float = 0.0
    stop_s: float = 0.0
    requeued: bool = False

    @property
    def useful_s(self) -> float:
        """Seconds spent on iterations that count."""
        return max(0, self.kept_iter - self.first_iter) * self.step_s


@dataclass
class NodeRecord:
    """What the agent of one node says of itself, in RUN/slurm/JOB-RESTART/NODE.json.

    Attributes:
        node: the node's name.
        code: how its ranks ended; None while they run.
        signals: names of the signals that the agent received.
        error: what went wrong, for the user to read.
        failure: the fields of the `Failure` that led to the others; None if no rank failed.
        stop_s: from the first signal until all state was saved and all ranks were gone.
    """

    node: str
    code: int | None = None
    signals: list[str] = field(default_factory=list)
    error: str = ""
    failure: dict[str, Any] | None = None
    stop_s: float = 0.0

    def write(self, run_dir: Path) -> None:
        """Write it, whole, for `end` to read; OSError if the run folder cannot be written."""
        folder = attempt_folder(run_dir)
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{self.node}.json", dataclasses.asdict(self))


def prepare(run_dir: Path, *, job_id: str | None = None) -> Path:
    """Make the private folder of a run for a new job, and the file by which a node knows the run.

    Args:
        run_dir: the run folder.
        job_id: the job's if it is known already; another one must not be at work there.

    Raises:
        ConfigError: another job works on this run.
    """
    folder = run_dir / SLURM_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # what is pickled there is run by whoever reads it
    refuse_other_job(run_dir, job_id=job_id)
    write_json(folder / SUBMITTED_FILE, {"job_id": job_id, "from": socket.gethostname()})
    return folder


def refuse_other_job(run_dir: Path, *, job_id: str | None = None) -> None:
    """Check that no SLURM job works on a run, or waits to.

    Args:
        run_dir: the run folder.
        job_id: of a job that may.

    Raises:
        ConfigError: another one does, or SLURM does not say.
    """
    other = read_json(run_dir / SLURM_FOLDER / SUBMITTED_FILE).get("job_id")
    if not other or other == job_id:
        return
    try:
        status = slurm_queue.status(other)
    except slurm_queue.QueueError as error:
        raise ConfigError(
            f"run.dir={run_dir}: cannot tell whether job {other} still works on this run "
            f"({error}); if it is over, remove {SLURM_FOLDER}/{SUBMITTED_FILE} there"
        ) from error
    if status is not None and not status.ended:
        raise ConfigError(
            f"run.dir={run_dir}: job {other} ({status.state}) works on this run; wait for it, "
            f"`scancel {other}`, or give another run.name"
        )


def ask_to_stop(run_dir: Path, job_id: str) -> None:
    """Leave word that a job is to end with its state saved, and not to be requeued.

    Its nodes look when they start, its batch script at the end; `scancel --signal` wakes ranks that
    are at work. A plain `scancel` would give them no more than SLURM's KillWait, 30 s.
    """
    write_json(run_dir / SLURM_FOLDER / _STOP_FILE, {"job_id": job_id})


def is_asked_to_stop(run_dir: Path, job_id: str | None) -> bool:
    """Say whether somebody left word for a job; see `ask_to_stop`."""
    asked = read_json(run_dir / SLURM_FOLDER / _STOP_FILE)
    return bool(asked) and asked.get("job_id") == job_id


def forget_to_stop(run_dir: Path) -> None:
    """Remove the word: the job has ended, and who requeues it by hand wants it to run."""
    (run_dir / SLURM_FOLDER / _STOP_FILE).unlink(missing_ok=True)


def attempt_folder(run_dir: Path) -> Path:
    """Return the folder in which the nodes of this attempt meet."""
    name = f"{slurm_queue.own_job_id()}-{slurm_queue.own_restarts()}"
    return run_dir / SLURM_FOLDER / name


def nodes_there(run_dir: Path) -> set[str]:
    """Return the names of the nodes of this attempt that have a record; opens no file."""
    try:
        names = os.listdir(attempt_folder(run_dir))
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def read_nodes(run_dir: Path) -> dict[str, NodeRecord]:
    """Return what the nodes of this attempt said so far, by their names."""
    records = (read_json(path) for path in sorted(attempt_folder(run_dir).glob("*.json")))
    return {fields["node"]: NodeRecord(**fields) for fields in records if fields}


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Return the attempts of a run that are over, oldest first."""
    try:
        data = read_regular(run_dir / ATTEMPTS_FILE, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return []
    return [Attempt(**json.loads(line)) for line in data.splitlines() if line.strip()]


def summary(attempts: Sequence[Attempt]) -> str:
    """Return a table of attempts, the iterations that were lost, and the goodput.

    Goodput is the time of the iterations that count over all time since the first start, waiting
    in the queue between attempts included.
    """
    rows = [("attempt", "job", "nodes", "iterations", "kept", "lasted", "outcome", "why")]
    for a in attempts:
        done = f"{a.first_iter}-{a.last_iter}"
        lasted = f"{a.end - a.start:.0f} s"
        row = (str(a.attempt), a.job_id, ",".join(a.nodes), done, str(a.kept_iter), lasted)
        rows.append((*row, a.outcome, a.why.splitlines()[0] if a.why else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lost = sum(max(0, a.last_iter - a.kept_iter) for a in attempts)
    total_s = attempts[-1].end - attempts[0].start if attempts else 0.0
    useful_s = sum(a.useful_s for a in attempts)
    goodput = f", goodput {useful_s / total_s:.0%}" if useful_s and total_s > 0 else ""
    lines.append(f"{lost} iterations lost{goodput}")
    return "\n".join(line.rstrip() for line in lines)


def judge(
    nodes: dict[str, NodeRecord],
    expected: Sequence[str],
    step_exit: int,
    status: slurm_queue.Status | None,
) -> tuple[ExitCode, str, str]:
    """Return how an attempt ended (code, outcome, why) from what its nodes left behind.

    Args:
        nodes: the records that there are.
        expected: the names of all nodes.
        step_exit: what `srun` returned.
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
    if first is not None and not (is_of_peer and silent):  # who lost a peer did not fail by itself
        return ExitCode(first.code or ExitCode.FAILED), "failed", first.error
    signals = sorted({f"{name} on {n.node}" for n in nodes.values() for name in n.signals})
    if not silent:
        if all(n.code == ExitCode.FINISHED for n in nodes.values()):
            return ExitCode.FINISHED, "finished", "all iterations are done"
        return ExitCode.STOPPED, "stopped", ", ".join(signals) or "a rank was asked to stop"
    if status is not None and status.reason == "TimeLimit":
        return ExitCode.FAILED, "lost", "the time limit came before the state was saved"
    if status is not None and status.state != "RUNNING":
        ended = "cancelled, preempted or requeued before the state was saved"
        return ExitCode.FAILED, "lost", ended
    never = [name for name in silent if name not in nodes]
    lost = f"no word from {', '.join(never or silent)} (srun returned {step_exit})"
    return ExitCode.FAILED, "lost", lost


def without_progress(attempts: Sequence[Attempt], job_id: str) -> int:
    """Return how many of a job's last attempts in a row led to no newer checkpoint."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.job_id != job_id or attempt.kept_iter > attempt.first_iter:
            break
        count += 1
    return count


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    atomic.write(path, json.dumps(fields).encode(), sync=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON file; empty if it is not there."""
    try:
        fields = json.loads(read_regular(path, max_bytes=_MAX_BYTES))
    except (FileNotFoundError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
