"""launch=slurm: submit a run as one SLURM job, through submitit.

The job has one task per node, the agent of the node's ranks (`slurm.task`). Its batch script
records each attempt and requeues the job (`slurm.batch`). Submission imports no torch.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distrain.checks import whole, wrong
from distrain.errors import ConfigError, ExitCode
from distrain.launch import Job, Launcher
from distrain.launch.slurm import code_snapshot, queue, script
from distrain.launch.slurm.attempts import prepare
from distrain.launch.slurm.client import SlurmClient, log_name
from distrain.launch.slurm.task import NodeOptions
from distrain.runfolder.attempts import JOB_FOLDER
from distrain.text import counted


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher(NodeOptions, Launcher):
    """Submits jobs to SLURM; conf/launch/slurm.yaml describes each key."""

    waits: ClassVar[bool] = False
    client = SlurmClient

    nodes: int = 1
    min_nodes: int | None = None
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
    array_parallelism: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "min_nodes", "cpus_per_task", "time_min", "signal_s"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=1)
        if self.gpus_per_node is not None:
            whole("gpus_per_node", self.gpus_per_node, least=0)
        if self.array_parallelism is not None:
            whole("array_parallelism", self.array_parallelism, least=1)
        if self.min_nodes and self.min_nodes > self.nodes:
            raise wrong("min_nodes", self.min_nodes, f"at most launch.nodes={self.nodes}")
        if self.time_min and self.signal_s and self.signal_s >= 60 * self.time_min:
            limit = f"launch.time_min={self.time_min} ({60 * self.time_min} s)"
            raise wrong("signal_s", self.signal_s, f"less than the time limit, {limit}")

    @property
    def ranks_per_node(self) -> int:
        return self.ranks or self.gpus_per_node or 1

    def start(self, job: Job) -> ExitCode:
        """Submit a job; with `follow` return how the run ended, else FINISHED.

        Raises:
            ConfigError: SLURM refuses the job, or there is no SLURM.
            RankFailed: with `follow`, the run failed; the text is the first failing rank's.
        """
        return self.start_all([job])

    def start_all(self, jobs: Sequence[Job]) -> ExitCode:
        """Submit jobs, several as one job array; otherwise as `start`."""
        job_ids = self.submit(jobs)
        runs = [Path(job.run_dir).absolute() for job in jobs]
        size = f"{counted(self.nodes, 'node')} x {counted(self.ranks_per_node, 'rank')}"
        for job_id, run_dir in zip(job_ids, runs, strict=True):
            print(f"job {job_id} ({size}): {run_dir}", flush=True)
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

        queue.require()
        runs = [Path(job.run_dir).absolute() for job in jobs]
        for run_dir in runs:
            prepare(run_dir)
        folder = _submit_folder(runs)
        if self.snapshot:
            code_snapshot.take(folder / code_snapshot.FOLDER)
        executor = SlurmExecutor(folder=folder, python=script.python(self))
        executor.update_parameters(**script.parameters(self, runs, folder))
        # submitit prints the output of sbatch, and raises it too
        try:
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():
                submitted = [executor.submit(self.task(job)) for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise self._refused(str(error)) from error
        job_ids = [str(job.job_id) for job in submitted]
        for job_id, run_dir in zip(job_ids, runs, strict=True):
            prepare(run_dir, job_id=job_id)
            _link_log(run_dir / log_name(job_id), folder)
        return job_ids

    def plan(self, job: Job) -> str:
        """Return the batch script, and the answer of `sbatch --test-only`."""
        from submitit.slurm.slurm import _make_sbatch_string

        run_dir = Path(job.run_dir).absolute()
        folder = run_dir / JOB_FOLDER
        python, at = script.python(self), shlex.quote(str(folder))
        text: str = _make_sbatch_string(
            command=f"{python} -u -m submitit.core._submit {at}",
            folder=folder,
            **script.parameters(self, [run_dir], folder),
        )
        try:
            queue.require()
        except ConfigError as error:
            return f"{text}\n# not tested: {error}"
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(text)
            file.flush()
            done = subprocess.run(
                ["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False
            )
        if done.returncode:
            if not queue.answers():
                return f"{text}\n# not tested, SLURM does not answer: {done.stderr.strip()}"
            raise self._refused(done.stderr)
        return f"{text}\n# sbatch --test-only: {done.stderr.strip()}"

    def _refused(self, stderr: str) -> ConfigError:
        """Return the error for sbatch's message, with the available partitions or nodes."""
        lines = [
            line.partition("error: ")[2] or line for line in stderr.splitlines() if line.strip()
        ]
        text = "; ".join(lines) or "sbatch failed"
        if "partition" in text.lower() and "specified" in text:
            available = ", ".join(queue.partitions())
            return ConfigError(
                f"launch.partition={self.partition}: no such one; available: {available}"
            )
        if "node configuration is not available" in text or "CPU count" in text:
            asked = f"nodes={self.nodes}, gpus_per_node={self.gpus_per_node}, mem={self.mem}, "
            asked += f"cpus_per_task={self.cpus_per_task or self.ranks_per_node}"
            available = queue.node_kinds(self.partition)
            return ConfigError(f"launch: no such nodes ({asked}); available: {available}")
        return ConfigError(f"launch=slurm: SLURM refuses the job: {text}")


def _link_log(log: Path, folder: Path) -> None:
    """Let the log that an element of an array writes in `folder` be found in its run folder."""
    if log.parent != folder:
        with contextlib.suppress(FileExistsError):
            log.symlink_to(os.path.relpath(folder / log.name, log.parent))


def _submit_folder(runs: Sequence[Path]) -> Path:
    """Return a private folder for submitit's files."""
    if len(runs) == 1:
        return runs[0] / JOB_FOLDER
    above = Path(os.path.commonpath(runs), f".{JOB_FOLDER}")
    above.mkdir(mode=0o700, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=above))
    (folder / script.RUNS_FILE).write_text("".join(f"{run_dir}\n" for run_dir in runs))
    return folder
