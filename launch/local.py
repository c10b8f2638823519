"""launch=local: the ranks run on this machine, started by an agent in this process."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from distrain.checks import whole, wrong
from distrain.errors import ConfigError, ExitCode
from distrain.launch import Job, Launcher
from distrain.launch.gpus import GpuRequest, Grant, count_gpus, run_leased
from distrain.launch.options import RankOptions
from distrain.launch.stop import StopRequest
from distrain.log import report
from distrain.process.environment import env_int, environment
from distrain.process.garbage import importing
from distrain.run_layout import LOGS
from distrain.text import counted

_DEFAULT_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(RankOptions, Launcher):
    """Starts jobs on this machine.

    Args:
        ranks: number of ranks, on as many idle GPUs; None: one per visible GPU, else 2.
        in_process: run the job in this process, as the only rank, so that a debugger works.
        wait: wait in a queue until enough GPUs are idle; False: refuse to start without them.
        nice: step aside for runs that wait for the GPUs: save the state, wait, and continue.
        share: use the visible GPUs without leases, whatever else runs on them.
    """

    ranks: int | None = None
    in_process: bool = False
    wait: bool = False
    nice: bool = False
    share: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None:
            whole("ranks", self.ranks, least=1)
        if self.in_process and self.ranks not in (None, 1):
            raise wrong("ranks", self.ranks, "1 or null with launch.in_process=true")
        for name in ("wait", "nice", "share"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, getattr(self, name), "true or false")
        if self.nice and self.in_process:
            raise wrong("nice", True, "false with launch.in_process=true")
        if self.share and (self.wait or self.nice):
            raise wrong("share", True, "false with launch.wait=true or launch.nice=true")

    def start(self, job: Job) -> ExitCode:
        with StopRequest() as stop:  # before torch is imported, which takes a second
            return self._start(job, stop)

    def _start(self, job: Job, stop: StopRequest) -> ExitCode:
        if shutil.which("scontrol"):  # without SLURM no job can be asked about
            from distrain.launch.slurm.attempts import refuse_other_job

            refuse_other_job(Path(job.run_dir).absolute())
        if not self.in_process:
            refuse_among_ranks()
        if self.share:
            return self._run(job, Grant(), stop)
        run = os.path.abspath(job.run_dir)
        request = GpuRequest(
            self.ranks, run, wait=self.wait, nice=self.nice, only_first=self.in_process
        )
        return run_leased(lambda grant: self._run(job, grant, stop), request, stop)

    def _run(self, job: Job, grant: Grant, stop: StopRequest) -> ExitCode:
        """Run the ranks on the GPUs of a grant; without any, on those that torch finds."""
        if self.in_process:
            with environment({**grant.variables, **only_rank_env()}):
                return ExitCode(job())
        ranks = len(grant.gpus) or self._num_ranks()
        # importing torch, which comes next, prints nothing for seconds
        report(f"starting {counted(ranks, 'rank')}{grant.names()}")
        options = self.with_start_method()
        with importing():
            from distrain.launch.agent import run_node

        log_dir = Path(job.run_dir).absolute() / LOGS
        job = grant.held_by(job)
        with environment(grant.variables):
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
    """Raise ConfigError if torchrun or srun has started this process as one of several ranks."""
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
