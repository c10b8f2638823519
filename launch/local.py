"""launch=local: the ranks run on this machine, started by an agent in this process."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from distrain.checks import whole, wrong
from distrain.errors import ConfigError, ExitCode
from distrain.launch import Job, Launcher
from distrain.launch.options import RankOptions
from distrain.launch.stop import StopRequest
from distrain.process.environment import env_int, environment
from distrain.run_layout import LOGS

_DEFAULT_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(RankOptions, Launcher):
    """Starts jobs on this machine.

    Args:
        ranks: number of ranks; None: one per GPU, else 2.
        in_process: run the job in this process, as the only rank, so that a debugger works.
    """

    ranks: int | None = None
    in_process: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None:
            whole("ranks", self.ranks, least=1)
        if self.in_process and self.ranks not in (None, 1):
            raise wrong("ranks", self.ranks, "1 or null with launch.in_process=true")

    def start(self, job: Job) -> ExitCode:
        with StopRequest() as stop:  # before torch is imported, which takes a second
            return self._start(job, stop)

    def _start(self, job: Job, stop: StopRequest) -> ExitCode:
        if shutil.which("scontrol"):  # without SLURM no job can be asked about
            from distrain.launch.slurm.attempts import refuse_other_job

            refuse_other_job(Path(job.run_dir).absolute())
        if self.in_process:
            with environment(only_rank_env()):
                return ExitCode(job())
        refuse_among_ranks()
        ranks = self._num_ranks()
        plural = "s" if ranks > 1 else ""
        # importing torch, which comes next, prints nothing for seconds
        print(f"distrain: starting {ranks} rank{plural}", file=sys.stderr, flush=True)
        options = self.with_start_method()
        from distrain.launch.agent import run_node

        log_dir = Path(job.run_dir).absolute() / LOGS
        return run_node(job, ranks=ranks, log_dir=log_dir, stop=stop, options=options)

    def plan(self, job: Job) -> str:
        if self.in_process:
            return "one rank in this process"
        how = "one per GPU" if self.ranks is None and count_gpus() else "launch.ranks"
        restarts = f"at most {self.max_restarts} restarts"
        num = self._num_ranks()
        return f"{num} rank{'s' * (num > 1)} on this machine ({how}), {restarts}"

    def _num_ranks(self) -> int:
        return self.ranks or count_gpus() or _DEFAULT_RANKS


def only_rank_env() -> dict[str, str]:
    """Return the environment of the only rank of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def refuse_among_ranks() -> None:
    """Check that this process is not a rank itself.

    Raises:
        ConfigError: torchrun or srun has started this process as one of several ranks.
    """
    # a container may set RANK=0 and WORLD_SIZE=1: then no other program has started ranks
    is_of_several = "RANK" in os.environ and env_int("WORLD_SIZE", 1) > 1
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or is_of_several
    tasks = env_int("SLURM_STEP_NUM_TASKS", 1)
    if by_torchrun or tasks > 1:
        starter = "torchrun" if by_torchrun else f"srun, one of {tasks} tasks"
        raise ConfigError(
            f"this process is a rank already (of {starter}); use launch=external, or start the "
            "command without it"
        )


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use, without initialising CUDA."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else _num_visible(visible, count)


def _num_visible(visible: str, count: int) -> int:
    """Return how many of `count` GPUs CUDA_VISIBLE_DEVICES names; CUDA stops at the first error.

    Example: "0,1" of 8: 2; "" or "-1": 0; "0,9,1" of 8: 1; "GPU-8f2c,MIG-a1": 2.
    """
    number = 0
    for name in visible.replace(" ", "").split(","):
        is_index = name.isdigit() and int(name) < count
        if not is_index and not name.startswith(("GPU-", "MIG-")):
            break
        number += 1
    return number
