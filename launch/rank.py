"""Entry point of a rank process."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from distrain import heartbeat
from distrain.errors import ExitCode
from distrain.files import temp_folder
from distrain.launch import Job, failure
from distrain.process import stdio
from distrain.process.threads import limit_exit

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals that request a stop; the job sets the handlers."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_log: IO[bytes] | None = None  # faulthandler writes to it at the very end


def rank_main(job: Job, log_dir: Path, agent_pid: int, num_threads: int | None) -> int:
    """Run a job as a rank of an agent; return its exit code.

    The process gets its own session: a Ctrl-C reaches only the agent, which requests the stop. It
    is killed when the agent ends, by `kill -9` too.

    Args:
        job: to run.
        log_dir: folder of the logs.
        agent_pid: process of the agent.
        num_threads: of torch; None: unchanged.

    Raises:
        SystemExit: FAILED, when the job has failed; the error is in TORCHELASTIC_ERROR_FILE.
    """
    # SIGUSR1 until there is a log; SIGHUP for good, as the agent receives it too
    for number in (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    temp_folder.use_inherited()
    pulse = heartbeat.current()
    os.setsid()
    die_with_parent()
    if os.getppid() != agent_pid:  # it ended before die_with_parent
        os._exit(ExitCode.FAILED)
    rank = int(os.environ["RANK"])
    log = open_log(log_dir, rank)
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    try:
        code = ExitCode(job())
        pulse.finish()
        limit_exit(0)  # of the process; the job's code is returned
        return code
    except BaseException as error:
        # without the frame of this function
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        found = failure.of_exception(error, rank=rank, log=log)
        append(log, found.trace)
        failure.write(found, os.environ["TORCHELASTIC_ERROR_FILE"])
        limit_exit(ExitCode.FAILED)
        raise SystemExit(int(ExitCode.FAILED)) from None


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, by `kill -9` too."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def log_path(log_dir: Path, rank: int) -> str:
    """Return the path of a rank's log."""
    return str(log_dir / f"rank_{rank}.log")


def open_log(log_dir: Path, rank: int) -> str:
    """Redirect stdout and stderr of this rank to its log, but for rank 0; return the log's path.

    On every rank the log gets the stack of a crash, and all stacks at a SIGUSR1.
    """
    global _log
    log_dir.mkdir(exist_ok=True)  # not its parents: a removed run folder stays removed
    path = log_path(log_dir, rank)
    stdio.protect()
    _log = open(path, "ab", buffering=0)  # noqa: SIM115 - open until the process ends
    faulthandler.enable(file=_log)
    faulthandler.register(signal.SIGUSR1, file=_log, all_threads=True)
    if rank != 0:
        stdio.redirect(_log)
    return path


def append(path: str, text: str) -> None:
    """Append text to a log by one write, also with several writers; ignore errors."""
    # the log may be removed, or its disk full: the failure is reported elsewhere too
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        file.write(text.encode(errors="replace"))


def loopback_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep traffic between ranks of one machine on loopback."""
    if not os.path.exists("/sys/class/net/lo"):
        return {}
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: "lo" for name in names if name not in env}
