"""launch=external: this process is a rank already, started by torchrun or srun."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ConfigError, ExitCode
from distrain.launch import Job, Launcher, failure
from distrain.launch.local import only_rank_env
from distrain.launch.rank import append, die_with_parent, open_log
from distrain.launch.run_dir_handover import Handover
from distrain.process.environment import env_int, environment, restart_count
from distrain.run_layout import LOGS

_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE",
}
_YIELD_S = 2.0  # in which rank 0 reports an error that all ranks have


@dataclass(frozen=True, kw_only=True)
class ExternalLauncher(Launcher):
    """Runs a job as the rank that this process is; all ranks use the run folder of rank 0.

    torchrun sets the rank. Under srun SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS do, and the
    batch script exports MASTER_ADDR and MASTER_PORT.
    """

    @property
    def owns_run(self) -> bool:
        return rank_env(os.environ)["RANK"] == "0"

    @property
    def is_restart(self) -> bool:
        return restart_count() > 0

    @property
    def handover(self) -> Handover:
        return Handover(rank_env(os.environ))

    def start(self, job: Job) -> ExitCode:
        with environment(rank_env(os.environ)), _console_kept():
            rank = env_int("RANK")
            die_with_parent()
            log = open_log(Path(job.run_dir).absolute() / LOGS, rank)
            try:
                return ExitCode(job())
            except BaseException as error:
                found = failure.of_exception(error, rank=rank, log=log)
        append(log, found.trace)
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            failure.write(found, path)
        if found.is_final and rank != 0:
            # all ranks have the same error: rank 0 reports it, then the starter ends this process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_YIELD_S)
        if found.of_peer:  # the traceback of a rank that lost its peer would bury the peer's
            found = dataclasses.replace(found, trace="")
        raise found.error()

    def plan(self, job: Job) -> str:
        env = rank_env(os.environ)
        return f"rank {env['RANK']} of {env['WORLD_SIZE']}, started by another program"


@contextmanager
def _console_kept() -> Iterator[None]:
    """Restore stdout and stderr after they were redirected to a log."""
    streams, numbers = (sys.stdout, sys.stderr), [os.dup(1), os.dup(2)]
    try:
        yield
    finally:
        for number, stream in zip(numbers, (sys.stdout, sys.stderr), strict=True):
            stream.flush()
            os.dup2(number, 1 if stream is sys.stdout else 2)
            os.close(number)
        sys.stdout, sys.stderr = streams


def rank_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a rank, from torchrun's variables or SLURM's, else ConfigError."""
    found = {name: env[name] for name in _NEEDED if env.get(name)}
    if "RANK" not in found:
        found |= {name: env[of] for name, of in _OF_SLURM.items() if of in env}
        # "2(x3),1" means two on each of three nodes, then one
        per_node = found.get("LOCAL_WORLD_SIZE", "1")
        found["LOCAL_WORLD_SIZE"] = per_node.partition("(")[0].partition(",")[0]
    if found.get("WORLD_SIZE") == "1":  # as a container sets it for a job of one process
        found = only_rank_env() | found
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise ConfigError(
            f"launch=external: {', '.join(missing)} not set; start it with torchrun, or with srun "
            "after exporting MASTER_ADDR and MASTER_PORT, or use launch=local"
        )
    _check_range(found, "WORLD_SIZE", 1)
    _check_range(found, "RANK", 0, int(found["WORLD_SIZE"]) - 1)
    _check_range(found, "LOCAL_WORLD_SIZE", 1)
    _check_range(found, "LOCAL_RANK", 0)
    _check_range(found, "MASTER_PORT", 1, 65535)
    return found


def _check_range(env: Mapping[str, str], name: str, least: int, most: float = math.inf) -> None:
    """Raise ConfigError unless a variable is an integer from `least` to `most`."""
    # a rank that is not among the ranks would be waited for, without a message
    text = env[name].strip()
    if not text.isdecimal() or not least <= int(text) <= most:
        limits = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(
            f"launch=external: {name}={env[name]}: expected an integer {limits}, as the program "
            "that starts the ranks sets it"
        )
