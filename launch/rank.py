"""The first and last things that a rank's process does, around its job."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distrain import heartbeat
from distrain.errors import ExitCode
from distrain.files import temp_folder as tempfolder
from distrain.launch import Job, failure
from distrain.process import stdio
from distrain.process.threads import limit_exit

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""What asks a rank to stop; its job sets the handlers."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_log: IO[bytes] | None = None  # faulthandler writes to it at the very end


@dataclass(frozen=True)
class RankTask:
    """What an agent tells the ranks that it starts.

    Attributes:
        job: to run.
        log_dir: folder of the logs.
        agent_pid: the process that starts the ranks.
        num_threads: of torch in each rank; None leaves the number alone.
    """

    job: Job
    log_dir: Path
    agent_pid: int
    num_threads: int | None


def rank_main(task: RankTask) -> int:
    """Run a job as a rank of an agent; return its exit code.

    The process gets a session of its own, so that a Ctrl-C in the terminal reaches only the agent,
    which asks the ranks to stop. It dies with the agent, however that dies.

    Raises:
        SystemExit: with FAILED, when the job has failed; why is in TORCHELASTIC_ERROR_FILE.
    """
    # SIGUSR1 until there is a log; SIGHUP for good, as the agent receives it too
    for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    tempfolder.use_inherited()
    pulse = heartbeat.of_this_process()
    os.setsid()
    die_with_parent()
    if os.getppid() != task.agent_pid:  # it died before we asked
        os._exit(ExitCode.FAILED)
    rank = int(os.environ["RANK"])
    log = open_log(task.log_dir, rank)
    if task.num_threads is not None:
        import torch

        torch.set_num_threads(task.num_threads)
    try:
        code = ExitCode(task.job())
        pulse.finish()
        limit_exit(0)  # of the process: the job's own code is what is returned
        return code
    except BaseException as error:
        # the frame of this function tells the user nothing
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        what = failure.of_exception(error, rank=rank, log=log)
        append(log, what.trace)
        failure.write(what, os.environ["TORCHELASTIC_ERROR_FILE"])
        limit_exit(ExitCode.FAILED)
        raise SystemExit(int(ExitCode.FAILED)) from None


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, also by `kill -9`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def log_path(log_dir: Path, rank: int) -> str:
    """Return the path of a rank's log."""
    return str(log_dir / f"rank_{rank}.log")


def open_log(log_dir: Path, rank: int) -> str:
    """Send what this rank prints to its log, except for rank 0, which keeps the console.

    The stack of a crash goes to the log on every rank, and all stacks at a SIGUSR1.

    Returns:
        the log's path.
    """
    global _log
    log_dir.mkdir(exist_ok=True)  # not its parents: a run folder that is gone stays gone
    path = log_path(log_dir, rank)
    stdio.protect()
    _log = open(path, "ab", buffering=0)  # noqa: SIM115 - for as long as the process lives
    faulthandler.enable(file=_log)
    faulthandler.register(signal.SIGUSR1, file=_log, all_threads=True)
    if rank != 0:
        stdio.redirect(_log)
    return path


def append(path: str, text: str) -> None:
    """Add text to a log, whole even where several write to it; nothing where that fails.

    The log may be gone, or its disk full: what failed is reported all the same.
    """
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        file.write(text.encode(errors="replace"))


def loopback_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep the traffic of ranks on one machine off its network."""
    if not os.path.exists("/sys/class/net/lo"):
        return {}
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: "lo" for name in names if name not in env}
