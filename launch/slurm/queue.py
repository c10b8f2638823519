"""State of SLURM jobs by scontrol and sinfo; `sacct` would need a database that few sites have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.errors import ConfigError
from distrain.process.environment import env_int

ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""Final states of a job."""


class QueueError(RuntimeError):
    """SLURM did not answer, or refused; the text is its first line."""


@dataclass(frozen=True)
class Status:
    """State of one job."""

    job_id: str  # as `squeue` writes it, an array's element as `12_3`
    state: str  # such as PENDING, RUNNING, COMPLETING or one of `ENDED`
    reason: str  # of its wait or its end, or "None"
    nodes: str  # their names in SLURM's short form, as n[1-2]; "" before the job has any
    restarts: int  # number of requeues
    exit_code: int  # of the batch script
    signal: int  # that ended the batch script, else 0

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.state in ENDED


def parse(line: str) -> Status:
    """Read a line of `scontrol show job --oneliner`."""
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
    job_id = fields["JobId"]
    if "ArrayTaskId" in fields and fields["ArrayTaskId"].isdigit():
        job_id = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    code, _, signal = fields.get("ExitCode", "0:0").partition(":")
    return Status(
        job_id=job_id,
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        restarts=int(fields.get("Restarts", "0")),
        exit_code=int(code),
        signal=int(signal or 0),
    )


def status(job_id: str) -> Status | None:
    """Return the state of a job, or of an array's element; None minutes after its end.

    Raises:
        QueueError: SLURM does not answer.
    """
    try:
        text = run(["scontrol", "show", "job", "--oneliner", job_id])
    except QueueError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return next((parse(line) for line in text.splitlines() if line.startswith("JobId=")), None)


def requeue(job_id: str) -> None:
    """Requeue a job, or an array's element such as `12_3`; QueueError if SLURM refuses."""
    run(["scontrol", "requeue", job_id])


def hostnames(nodes: str) -> list[str]:
    """Expand a node list: n[1-2] is n1 and n2."""
    return run(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


def partitions() -> list[str]:
    """Return the names of all partitions."""
    return sorted(set(run(["sinfo", "--noheader", "--format=%R"]).split()))


def answers() -> bool:
    """Return whether SLURM answers at all."""
    try:
        partitions()
    except QueueError:
        return False
    return True


def node_kinds(partition: str | None) -> str:
    """Return the nodes of a partition, of all if None, for an error message."""
    command = ["sinfo", "--noheader", "--exact", "--format=%D nodes of %c CPUs, %m MB, gres %G"]
    if partition:
        command.append(f"--partition={partition}")
    return "; ".join(dict.fromkeys(run(command).splitlines()))


def own_job_id() -> str | None:
    """Return the id of this process's job; None without one."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def own_restarts() -> int:
    """Return the number of requeues of this process's job."""
    return env_int("SLURM_RESTART_COUNT")


def require() -> None:
    """Raise ConfigError on a machine without the commands of SLURM."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"launch=slurm: no {', '.join(missing)} on the PATH of this machine; run this where "
            "jobs are submitted, or launch=local for this machine alone"
        )


def run(command: Sequence[str], *, timeout_s: float = 60.0) -> str:
    """Return the output of a SLURM command; QueueError with the first line of its error."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise QueueError(f"{command[0]}: there is no such command here") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{command[0]} gave no answer in {timeout_s:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise QueueError(lines[0] if lines else f"{command[0]} failed with {done.returncode}")
    return done.stdout
