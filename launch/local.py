"""launch=local: the ranks run on this machine, started by an agent in this process."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ConfigError, ExitCode
from distrain.launch import Job
from distrain.launch.stop import StopRequest
from distrain.process.environment import env_int
from distrain.run_layout import LOGS

_DEFAULT_RANKS = 2

_idle_threads: int | None = None  # of this process, right after it has imported torch for the ranks


@dataclass(frozen=True, kw_only=True)
class LocalLauncher:
    """Starts jobs on this machine.

    Args:
        ranks: how many; None: one a GPU, else 2.
        max_restarts: how often all ranks start again after one has failed.
        in_process: run the job in this very process, as the only rank: a debugger works.
        grace_s: from a request to stop until ranks that are still there are killed, in seconds.
        start_method: "fork" or "spawn"; None: fork where that is sound, as it is faster.
        watchdog_s: how long a rank may make no progress, in any phase, in seconds, until all are
            killed as after a failure; 0: for ever; None: 50 usual steps, at least 60 s, and at
            least 600 s for the first step and outside of the step.

    Raises:
        ConfigError: an argument out of its range.
    """

    ranks: int | None = None
    max_restarts: int = 0
    in_process: bool = False
    grace_s: float = 120.0
    start_method: str | None = None
    watchdog_s: float | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"ranks={self.ranks}: expected at least 1")
        if self.in_process and self.ranks not in (None, 1):
            raise ConfigError(f"ranks={self.ranks}: with in_process=true there is one rank")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts={self.max_restarts}: expected at least 0")
        if self.grace_s <= 0:
            raise ConfigError(f"grace_s={self.grace_s}: expected a number above 0")
        if self.watchdog_s is not None and self.watchdog_s < 0:
            raise ConfigError(f"watchdog_s={self.watchdog_s}: expected at least 0, or null")
        if self.start_method not in (None, "fork", "spawn"):
            raise ConfigError(f"start_method={self.start_method}: fork, spawn or null is needed")

    def start(self, job: Job) -> ExitCode:
        """Run a job to its end; see `distrain.launch.Launcher`."""
        with StopRequest() as stop:  # before torch is imported: that takes a second
            return self._start(job, stop)

    def _start(self, job: Job, stop: StopRequest) -> ExitCode:
        if shutil.which("scontrol"):  # elsewhere nobody can be asked about the run's jobs
            from distrain.launch.slurm.attempts import refuse_other_job

            refuse_other_job(Path(job.run_dir).absolute())
        if self.in_process:
            return run_here(job)
        refuse_among_ranks()
        ranks = self.ranks or count_gpus() or _DEFAULT_RANKS
        plural = "s" if ranks > 1 else ""
        print(f"distrain: starting {ranks} rank{plural}", file=sys.stderr, flush=True)
        # from here on torch is imported, for which there is nothing to see for seconds
        method = self.start_method or ("fork" if may_fork() else "spawn")
        from distrain.launch.agent import run_node

        return run_node(
            job,
            ranks=ranks,
            log_dir=Path(job.run_dir).absolute() / LOGS,
            stop=stop,
            max_restarts=self.max_restarts,
            grace_s=self.grace_s,
            start_method=method,
            watchdog_s=self.watchdog_s,
        )

    def plan(self, job: Job) -> str:
        """Return what `start` would do, in one line."""
        if self.in_process:
            return "one rank in this process"
        how = "one a GPU" if self.ranks is None and count_gpus() else "launch.ranks"
        ranks = self.ranks or count_gpus() or _DEFAULT_RANKS
        return f"{ranks} ranks on this machine ({how}), at most {self.max_restarts} restarts"


def run_here(job: Job) -> ExitCode:
    """Run a job in this process as the only rank, with the environment of one."""
    with environment(only_rank_env()):
        return ExitCode(job())


def only_rank_env() -> dict[str, str]:
    """Return the variables that name the rank of a world of one."""
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
    # a container may set RANK=0 and WORLD_SIZE=1: a world of one is no rank of another program's
    is_of_several = "RANK" in os.environ and env_int("WORLD_SIZE", 1) > 1
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or is_of_several
    tasks = env_int("SLURM_STEP_NUM_TASKS", 1)
    if by_torchrun or tasks > 1:
        who = "torchrun" if by_torchrun else f"srun, one of {tasks} tasks"
        raise ConfigError(
            f"this process is a rank already (of {who}); use launch=external, or start the command "
            "without it"
        )


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use, without making CUDA start."""
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
    if visible is None:
        return count
    return _num_visible(visible, count)


def _num_visible(visible: str, count: int) -> int:
    """Return how many of `count` GPUs CUDA_VISIBLE_DEVICES names; CUDA ends at the first wrong.

    Example: "0,1" of 8: 2; "" or "-1": 0; "0,9,1" of 8: 1; "GPU-8f2c,MIG-a1": 2.
    """
    number = 0
    for name in visible.replace(" ", "").split(","):
        is_index = name.isdigit() and int(name) < count
        if not is_index and not name.startswith(("GPU-", "MIG-")):
            break
        number += 1
    return number


def may_fork() -> bool:
    """Say whether a forked rank can use torch; imports it.

    It can where this process has only imported torch: the thread pools of OpenMP and autograd, and
    a CUDA context, do not survive a fork.
    """
    global _idle_threads
    if not os.path.isdir("/proc/self/task") or threading.active_count() > 1:
        return False
    is_first = "torch" not in sys.modules
    import torch

    if is_first:
        _idle_threads = _num_threads()
    is_idle = _idle_threads is not None and _num_threads() <= _idle_threads
    return is_idle and not torch.cuda.is_initialized()


def _num_threads() -> int:
    """Return how many threads this process has, native ones too."""
    return len(os.listdir("/proc/self/task"))


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables inside `with`."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
