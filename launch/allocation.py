"""launch=allocation: runs a job on the nodes of the SLURM job that this process is in.

For `sbatch slurm/train.sbatch`, and for a shell that `salloc` gave. The nodes do the same as after
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
from distrain.launch import Job
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm.attempts import prepare, read_attempts
from distrain.launch.slurm.batch import begin, end
from distrain.launch.slurm.task import NodeTask, node_python
from distrain.process.environment import env_int
from distrain.progress import is_terminal


@dataclass(frozen=True, kw_only=True)
class AllocationLauncher:
    """Starts jobs on the nodes that SLURM has given to this process.

    Args:
        ranks: on each node; None: one a GPU where SLURM gave GPUs, else 1.
        max_requeues: attempts in a row without a newer checkpoint that are followed by another.
        max_restarts: how often a failed rank makes the ranks start again within an attempt.
        join_s: how long the first node waits for the others.
        grace_s: from a request to stop until ranks that are still there are killed.
        start_method: of the ranks, as in launch=local.
        watchdog_s: how long a rank may make no progress, as in launch=local.
    """

    ranks: int | None = None
    max_requeues: int = 3
    max_restarts: int = 0
    join_s: float = 60.0
    grace_s: float = 120.0
    start_method: str | None = None
    watchdog_s: float | None = None

    @property
    def is_restart(self) -> bool:
        """Whether SLURM has started the job again by itself."""
        return slurm_queue.own_restarts() > 0

    @property
    def ranks_per_node(self) -> int:
        """How many ranks each node runs."""
        given = os.environ.get("SLURM_GPUS_ON_NODE", "")
        return self.ranks or (int(given) if given.isdigit() else 0) or 1

    def start(self, job: Job) -> ExitCode:
        """Run a job to the end of this attempt; requeue the SLURM job where that helps.

        Returns:
            FINISHED, or STOPPED with the state saved.

        Raises:
            ConfigError: there is no allocation here, or a mistake that a rank found.
            RankFailed: the run failed; the text is the first failing rank's.
        """
        job_id = slurm_queue.own_job_id()
        if job_id is None:
            raise ConfigError(
                "launch=allocation: this process is in no SLURM job; `sbatch slurm/train.sbatch "
                "...` makes one, and launch=slurm submits from here"
            )
        run_dir = Path(job.run_dir).absolute()
        folder = prepare(run_dir, job_id=job_id)
        task = folder / f"{job_id}_task.pkl"
        task.write_bytes(pickle.dumps(self.task(job)))
        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, _go_on),
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
        """Return what `start` would do, in one line."""
        return f"{self.ranks_per_node} ranks on each of {_num_nodes()} nodes of this SLURM job"

    def task(self, job: Job) -> NodeTask:
        """Return what each node runs."""
        return NodeTask(
            job=job,
            run_dir=Path(job.run_dir).absolute(),
            ranks=self.ranks_per_node,
            max_restarts=self.max_restarts,
            join_s=self.join_s,
            grace_s=self.grace_s,
            start_method=self.start_method,
            watchdog_s=self.watchdog_s,
        )

    def _step(self, task: Path) -> list[str]:
        """Return the command that starts an agent on each node."""
        nodes = _num_nodes()
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not take it over by itself
        return [
            *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
            # unbuffered gives the step a terminal: escape sequences would go to slurm-*.out
            *(["--unbuffered"] if is_terminal(sys.stdout) else []),
            "--kill-on-bad-exit=1",
            *([f"--cpus-per-task={cpus}"] if cpus else []),
            *node_python(),
            *("-u", "-m", "distrain.launch.slurm.task", str(task)),
        ]


def _num_nodes() -> int:
    return env_int("SLURM_JOB_NUM_NODES", 1)


def _go_on(number: int, frame: FrameType | None) -> None:
    """Do nothing: SLURM has signalled the step too, and its end is what we wait for."""
