"""launch=slurm: submits a run as one SLURM job, through submitit.

The job has one task a node, an agent that starts the node's ranks (`slurm_task`). Its batch script
notes each attempt and requeues the job (`slurm_batch`); `slurm_follow` shows a job to the one who
waits for it. Submission needs no torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError, ExitCode
from distrain.launch import Job
from distrain.launch.slurm import code_snapshot as codecopy
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm import script as slurm_script
from distrain.launch.slurm.attempts import SLURM_FOLDER, prepare
from distrain.launch.slurm.task import NodeTask

_MAY_BE_0 = ("max_requeues", "max_restarts", "gpus_per_node", "watchdog_s")


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher:
    """Submits jobs to SLURM.

    Args:
        nodes: of the job.
        min_nodes: with how many an attempt may start where not all can be had, as after the loss of
            one; the global batch stays the same. None: nodes.
        ranks: on each node; None: one a GPU where gpus_per_node is given, else 1.
        gpus_per_node: of each node that are asked for.
        cpus_per_task: CPUs on each node, for its ranks and their loader workers; None: one a rank.
        mem: memory of each node as SLURM writes it, as "32G"; None: the partition's default.
        time_min: time limit of one attempt in minutes; None: the partition's default.
        partition: None: the site's default.
        account: to be charged.
        qos: quality of service.
        constraint: features that the nodes need.
        sbatch: any further options of sbatch, as {exclude: n3, exclusive: true}; they win.
        signal_s: how long before the time limit the run is told to save and stop; None: from the
            time that this took before, else 120 s.
        snapshot: run a copy of the repository one submits from, as it is at that moment; edits
            after it change nothing, also after a requeue.
        follow: wait for the job's end, and show its state and what rank 0 prints.
        max_requeues: attempts in a row without a newer checkpoint that are followed by another.
        max_restarts: how often a failed rank makes the ranks start again within an attempt.
        join_s: how long the first node waits for the others.
        grace_s: from a request to stop until ranks that are still there are killed.
        start_method: of the ranks, as in launch=local.
        watchdog_s: how long a rank may make no progress, as in launch=local.
        array_parallelism: elements of a job array that run at the same time.

    Raises:
        ConfigError: an argument out of its range.
    """

    nodes: int = 1
    min_nodes: int | None = None
    ranks: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time_min: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: Mapping[str, Any] = field(default_factory=dict)
    signal_s: int | None = None
    snapshot: bool = False
    follow: bool = False
    max_requeues: int = 3
    max_restarts: int = 0
    join_s: float = 60.0
    grace_s: float = 120.0
    start_method: str | None = None
    watchdog_s: float | None = None
    array_parallelism: int | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            may_be_0 = entry.name in _MAY_BE_0
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and (value < 0 or (value == 0 and not may_be_0)):
                least = "at least 0" if may_be_0 else "more than 0"
                raise ConfigError(f"launch.{entry.name}={value}: {least} is needed")
        if self.min_nodes and self.min_nodes > self.nodes:
            raise ConfigError(
                f"launch.min_nodes={self.min_nodes}: at most launch.nodes={self.nodes} is possible"
            )
        if self.time_min and self.signal_s and self.signal_s >= 60 * self.time_min:
            raise ConfigError(
                f"launch.signal_s={self.signal_s}: must be less than the time limit, "
                f"launch.time_min={self.time_min} ({60 * self.time_min} s)"
            )

    @property
    def ranks_per_node(self) -> int:
        """How many ranks each node runs."""
        return self.ranks or self.gpus_per_node or 1

    def start(self, job: Job) -> ExitCode:
        """Submit a job; follow it to its end where `follow` says so.

        Returns:
            FINISHED once it is submitted; with `follow` how the run ended.

        Raises:
            ConfigError: SLURM refuses the job, or there is no SLURM.
            RankFailed: with `follow`, the run failed; the text is the first failing rank's.
        """
        return self.start_all([job])

    def start_all(self, jobs: Sequence[Job]) -> ExitCode:
        """Submit jobs, several as one job array; otherwise as `start`."""
        job_ids = self.submit(jobs)
        runs = [Path(job.run_dir).absolute() for job in jobs]
        what = f"{self.nodes} nodes x {self.ranks_per_node} ranks"
        for job_id, run_dir in zip(job_ids, runs, strict=True):
            print(f"job {job_id} ({what}): {run_dir}", flush=True)
        if not self.follow:
            print(f"state: squeue -j {job_ids[0]}   stop, with its state saved: scancel ...")
            return ExitCode.FINISHED
        from distrain.launch.slurm.follow import follow, follow_all

        if len(jobs) == 1:
            return follow(job_ids[0], runs[0])
        return follow_all(dict(zip(job_ids, runs, strict=True)))

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Submit jobs, several as one job array, and return their ids in SLURM."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        slurm_queue.require()
        runs = [Path(job.run_dir).absolute() for job in jobs]
        for run_dir in runs:
            prepare(run_dir)
        folder = _submit_folder(runs)
        if self.snapshot:
            codecopy.take(folder / codecopy.FOLDER)
        executor = SlurmExecutor(folder=folder, python=slurm_script.python(self))
        executor.update_parameters(**slurm_script.parameters(self, runs, folder))
        said = io.StringIO()  # submitit prints what sbatch says, and raises it too
        try:
            with contextlib.redirect_stderr(said), executor.batch():
                submitted = [executor.submit(self.task(job)) for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise self._refused(str(error)) from error
        job_ids = [str(job.job_id) for job in submitted]
        for job_id, run_dir in zip(job_ids, runs, strict=True):
            prepare(run_dir, job_id=job_id)
        return job_ids

    def plan(self, job: Job) -> str:
        """Return the batch script that would be submitted, and what SLURM says of it."""
        from submitit.slurm.slurm import _make_sbatch_string

        run_dir = Path(job.run_dir).absolute()
        folder = run_dir / SLURM_FOLDER
        python, at = slurm_script.python(self), shlex.quote(str(folder))
        script: str = _make_sbatch_string(
            command=f"{python} -u -m submitit.core._submit {at}",
            folder=folder,
            **slurm_script.parameters(self, [run_dir], folder),
        )
        try:
            slurm_queue.require()
        except ConfigError as error:
            return f"{script}\n# not tested: {error}"
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(script)
            file.flush()
            done = subprocess.run(
                ["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise self._refused(done.stderr)
        return f"{script}\n# sbatch --test-only: {done.stderr.strip()}"

    def task(self, job: Job) -> NodeTask:
        """Return what each node of the job runs."""
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

    def _refused(self, said: str) -> ConfigError:
        """Return the error for what sbatch said, with what is allowed."""
        lines = [line.partition("error: ")[2] or line for line in said.splitlines() if line.strip()]
        text = "; ".join(lines) or "sbatch failed"
        if "partition" in text.lower() and "specified" in text:
            there = ", ".join(slurm_queue.partitions())
            return ConfigError(
                f"launch.partition={self.partition}: no such one; available: {there}"
            )
        if "node configuration is not available" in text or "CPU count" in text:
            asked = f"nodes={self.nodes}, gpus_per_node={self.gpus_per_node}, mem={self.mem}, "
            asked += f"cpus_per_task={self.cpus_per_task or self.ranks_per_node}"
            there = slurm_queue.node_kinds(self.partition)
            return ConfigError(f"launch: no such nodes ({asked}); available: {there}")
        return ConfigError(f"launch=slurm: SLURM refuses the job: {text}")


def _submit_folder(runs: Sequence[Path]) -> Path:
    """Return the folder for submitit's files; made, and private."""
    if len(runs) == 1:
        return runs[0] / SLURM_FOLDER
    above = Path(os.path.commonpath(runs), f".{SLURM_FOLDER}")
    above.mkdir(mode=0o700, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=above))
    (folder / slurm_script.RUNS_FILE).write_text("".join(f"{run_dir}\n" for run_dir in runs))
    return folder
