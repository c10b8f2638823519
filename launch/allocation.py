"""launch=allocation: run a job on the nodes of the SLURM job that this process is in.

For `sbatch slurm/train.sbatch`, and for a shell from `salloc`; the nodes do the same as with
launch=slurm.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from distrain.errors import ConfigError, ExitCode, RankFailed
from distrain.launch import Job, Launcher
from distrain.launch.slurm import queue
from distrain.launch.slurm.attempts import prepare
from distrain.launch.slurm.batch import begin, end
from distrain.launch.slurm.client import SlurmClient
from distrain.launch.slurm.task import NodeOptions, node_python
from distrain.process.environment import env_int
from distrain.progress import is_terminal
from distrain.runfolder.attempts import read_attempts


@dataclass(frozen=True, kw_only=True)
class AllocationLauncher(NodeOptions, Launcher):
    """Starts jobs on the nodes of this process's SLURM job."""

    client = SlurmClient

    @property
    def is_restart(self) -> bool:
        return queue.own_restarts() > 0

    @property
    def ranks_per_node(self) -> int:
        gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
        return self.ranks or (int(gpus) if gpus.isdigit() else 0) or 1

    def start(self, job: Job) -> ExitCode:
        """Run a job to the end of this attempt; requeue the SLURM job where that helps."""
        job_id = queue.own_job_id()
        if job_id is None:
            raise ConfigError(
                "launch=allocation: expected to be in a SLURM job: `sbatch slurm/train.sbatch ...` "
                "makes one; launch=slurm submits from here"
            )
        run_dir = Path(job.run_dir).absolute()
        folder = prepare(run_dir, job_id=job_id)
        task = folder / f"{job_id}_task.pkl"
        task.write_bytes(pickle.dumps(self.task(job)))
        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, _ignore),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        }
        try:
            code = begin(run_dir, max_requeues=self.max_requeues)
            if code == ExitCode.FINISHED:
                step = subprocess.run(self._step(task), check=False)
                code = end(run_dir, step_exit=step.returncode, max_requeues=self.max_requeues)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code in (ExitCode.FINISHED, ExitCode.STOPPED):
            return code
        why = read_attempts(run_dir)[-1].why
        raise ConfigError(why) if code == ExitCode.BAD_CONFIG else RankFailed(why)

    def plan(self, job: Job) -> str:
        return f"{self.ranks_per_node} ranks on each of {_num_nodes()} nodes of this SLURM job"

    def _step(self, task: Path) -> list[str]:
        """Return the command that starts an agent on each node."""
        nodes = _num_nodes()
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not read it since 22.05
        return [
            *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
            # gives the step a terminal, whose escape sequences must not go to slurm-*.out
            *(["--unbuffered"] if is_terminal(sys.stdout) else []),
            "--kill-on-bad-exit=1",
            *([f"--cpus-per-task={cpus}"] if cpus else []),
            *node_python(),
            *("-u", "-m", "distrain.launch.slurm.task", str(task)),
        ]


def _num_nodes() -> int:
    return env_int("SLURM_JOB_NUM_NODES", 1)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: SLURM has signalled the step too, and its end is waited for."""
