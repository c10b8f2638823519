"""Batch script of a job, as parameters of submitit's executor."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.launch.slurm import code_snapshot
from distrain.launch.slurm.task import node_python
from distrain.runfolder.attempts import read_attempts

if TYPE_CHECKING:
    from distrain.launch.slurm.launcher import SlurmLauncher

RUNS_FILE = "runs.txt"
"""In the folder of an array: the run folder of each element, one per line."""

_DEFAULT_LEAD_S = 120
_SLURM_DELAY_S = 60  # a signal comes up to this early or late: SLURM checks every 30 s


def python(launcher: SlurmLauncher) -> str:
    """Return the command that starts python on a node."""
    return shlex.join(node_python(*_flags(launcher)))


def parameters(launcher: SlurmLauncher, runs: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Return the parameters of submitit's executor, whose files go to `folder`.

    Several `runs`, which are absolute run folders, are one array.
    """
    cpus = launcher.cpus_per_task or launcher.ranks_per_node
    return {
        "job_name": Path(os.path.commonpath(runs)).name,
        "nodes": launcher.nodes,
        "cpus_per_task": cpus,
        "gpus_per_node": launcher.gpus_per_node or None,
        "mem": launcher.mem,
        "time": launcher.time_min,
        "partition": launcher.partition,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "signal_delay_s": max(lead_s(launcher, run_dir) for run_dir in runs),
        "stderr_to_stdout": True,
        "wckey": None,
        "array_parallelism": launcher.array_parallelism or 256,
        "additional_parameters": _options(launcher),
        # srun takes no --cpus-per-task from sbatch since 22.05. A task that fails ends the others:
        # they would wait for it.
        "srun_args": ["--kill-on-bad-exit=1", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"],
        **_around_step(launcher, runs, folder),
    }


def lead_s(launcher: SlurmLauncher, run_dir: Path) -> int:
    """Return the seconds before the time limit at which SLURM asks the run to stop.

    Twice the longest stop of the run so far plus SLURM's own delay, at most half of the limit.
    """
    if launcher.signal_s:
        return launcher.signal_s
    stop_s = max((attempt.stop_s for attempt in read_attempts(run_dir)), default=0.0)
    lead = math.ceil(2 * stop_s) + _SLURM_DELAY_S if stop_s else _DEFAULT_LEAD_S
    return min(lead, 30 * launcher.time_min) if launcher.time_min else lead


def _options(launcher: SlurmLauncher) -> dict[str, Any]:
    """Return the options of sbatch without a name in submitit, and the user's own."""
    options: dict[str, Any] = {"requeue": True}
    if launcher.min_nodes:
        options["nodes"] = f"{launcher.min_nodes}-{launcher.nodes}"
    else:  # with a range of nodes SLURM would allocate the fewest that hold that many tasks
        options["ntasks-per-node"] = 1
    if launcher.account:
        options["account"] = launcher.account
    for name, value in launcher.sbatch.items():
        if value is None or value is False:
            options.pop(name, None)
        else:
            options[str(name).replace("_", "-")] = value
    return options


def _around_step(
    launcher: SlurmLauncher, runs: Sequence[Path], folder: Path
) -> dict[str, list[str]]:
    """Return the lines before and after the step; see `slurm.batch`."""
    command = [sys.executable, *_flags(launcher), "-m", "distrain.launch.slurm.batch"]
    batch, allowed = shlex.join(command), f"--max-requeues {launcher.max_requeues}"
    code = []
    if launcher.snapshot:
        paths = os.pathsep.join(code_snapshot.python_path(folder / code_snapshot.FOLDER))
        code = [f"export PYTHONPATH={shlex.quote(paths)}"]
    run = shlex.quote(str(runs[0]))
    if len(runs) > 1:
        file = shlex.quote(str(folder / RUNS_FILE))
        run = f'$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {file})'
    return {
        "setup": [
            "trap : TERM CONT  # SLURM ends the step; then this script still records how",
            "export SUBMITIT_LOG_LEVEL=WARNING",
            *code,
            f"RUN={run}",
            f'{batch} begin "$RUN" {allowed} || exit $?',
        ],
        "teardown": [
            "code=$?",
            "trap '' TERM",
            f'{batch} end "$RUN" {allowed} --step-exit "$code"',
            "exit $?",
        ],
    }


def _flags(launcher: SlurmLauncher) -> list[str]:
    """Return flags of python; -P: the current folder must not precede the snapshot."""
    return ["-P"] if launcher.snapshot else []
