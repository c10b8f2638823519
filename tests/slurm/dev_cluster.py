"""What tests ask of the cluster that slurm/dev-cluster made."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SCRIPT = Path(__file__).parents[2] / "slurm" / "dev-cluster"
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
NODES = 4


class Cluster:
    """The cluster of this session: its folder, and what tests ask of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf = root / "slurm.conf"

    def script(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, "--root", self.root, *command], capture_output=True, text=True, timeout=180
        )

    def run(self, *command: str) -> str:
        return subprocess.check_output(command, text=True, timeout=60)

    def job(self, job_id: str) -> dict[str, str]:
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text.splitlines()[0]))

    def wait(self, job_id: str, *, timeout_s: float = 90.0) -> dict[str, str]:
        """Wait for the end of a job; return what SLURM says of it."""
        return wait_for(
            lambda: (job := self.job(job_id))["JobState"] in ENDED and job,
            timeout_s=timeout_s,
            what=lambda: str(self.job(job_id)),
        )

    def idle(self) -> bool:
        """Say whether all nodes are up and free."""
        return len(self.run("sinfo", "-hN", "-plow", "-tidle").splitlines()) == NODES

    def processes(self) -> dict[int, str]:
        """Return the command lines of all processes of jobs, on any node, by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"SLURM_CONF={self.conf}".encode() in environment and any(
                entry.startswith(b"SLURM_JOB_ID=") for entry in environment
            ):
                found[int(folder.name)] = command
        return {pid: command for pid, command in found.items() if command}

    def rank(self, job_id: str, rank: int) -> int:
        """Return the process of a rank: the one that has the rank's log open."""
        for pid in self.processes():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                files = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            is_of_job = f"SLURM_JOB_ID={job_id}".encode() in environment
            if is_of_job and any(file.endswith(f"/logs/rank_{rank}.log") for file in files):
                return pid
        raise AssertionError(f"rank {rank} of job {job_id} not found: {self.processes()}")


def is_alive(pid: int) -> bool:
    """Say whether a process runs; what nobody has reaped yet does not."""
    return _stat(pid)[:1] not in ([], ["Z"])


def parent(pid: int) -> int:
    """Return the pid of a process's parent."""
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def wait_for(
    condition: Callable[[], T],
    *,
    timeout_s: float,
    what: str | Callable[[], str] = "what was waited for",
) -> T:
    """Wait until a condition is true; return its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {timeout_s:.0f} s: {text}")
        time.sleep(0.2)
    return value
