"""Stop a run with its state saved, and resume it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distrain.checkpoint.mirror_url import mirror_of
from distrain.config.overrides import quoted
from distrain.errors import ConfigError, ExitCode
from distrain.launch.client import ACTIVE, State
from distrain.progress import waiting
from distrain.redact import MASK, masked_overrides
from distrain.run_layout import CONFIG_FILE
from distrain.runfolder import lock
from distrain.runs.escape import escaped
from distrain.runs.records import Start
from distrain.runs.summary import Summary, summarize_one

_POLL_S = 0.2
_JOB_POLL_S = 2.0  # each poll asks the scheduler
_MIRROR = "checkpoint.mirror"
_WITH_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
_OF_SWEEPS = ("hydra.sweep", "hydra.mode", "hydra.launcher")


def stop(path: Path, *, wait: bool) -> int:
    """Request that a run saves its state and stops; return 0, or 1 if it failed instead.

    Raises:
        ConfigError: it cannot be stopped from here.
    """
    run = summarize_one(path)
    if run.state == State.UNREADABLE:
        raise ConfigError(f"{path}: unknown whether it runs: {run.why}")
    if run.state not in ACTIVE:
        print(escaped(f"{path}: nothing is running: it is {run.state} at {_progress(run)}"))
        return 0
    client = run.files.client
    if client is None or run.files.unreadable or not client().stop(path, run.state):
        _signal_holder(run)
    if not wait:
        print(escaped(f"{path}: asked to save and stop"))
        return 0
    pause_s = _JOB_POLL_S if run.job_id else _POLL_S
    try:
        with waiting(lambda: f"{path} saves and stops: {_progress(run)}", stream=sys.stderr):
            while (run := summarize_one(path)).state in ACTIVE:
                time.sleep(pause_s)
    except KeyboardInterrupt:
        print(f"\n{path}: was asked to stop; not waited for", file=sys.stderr)
        return 128 + signal.SIGINT
    if not (path / CONFIG_FILE).exists():
        print(escaped(f"{path}: stopped while it waited for its start; nothing of it is left"))
        return 0
    print(escaped(f"{path}: {run.state} at {_progress(run)}" + (f": {run.why}" if run.why else "")))
    return 0 if run.state in (State.STOPPED, State.FINISHED) else int(ExitCode.FAILED)


def _progress(run: Summary) -> str:
    files = run.files
    return f"iteration {files.iteration} of {files.max_iter or '?'} ({files.kept_iter} saved)"


def _signal_holder(run: Summary) -> None:
    """Signal the process that holds a run's lock: the agent of the ranks, or the only rank."""
    path, launcher = run.files.path, run.files.launcher
    try:
        holder = lock.holder(path)
    except OSError as error:
        raise ConfigError(f"{path}: its lock cannot be read: {error.strerror}") from error
    if holder is None and (launcher is None or not launcher.waits):
        raise ConfigError(f"{path}: no process here holds its lock; stop it where its ranks run")
    if holder is None:
        return  # it has just ended
    host, pid = holder.get("host"), holder.get("pid")
    if host != socket.gethostname() or not isinstance(pid, int):
        raise ConfigError(f"{path}: it runs on {host}; stop it there: kill -TERM {pid}")
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise ConfigError(f"{path}: process {pid} is another user's: {error.strerror}") from error


def resume(path: Path, overrides: Sequence[str]) -> int:
    """Replace this process by the command of the run's last start, in its folder.

    Raises:
        ConfigError: it is running, or its command is unknown.
    """
    run = summarize_one(path)
    if run.state in ACTIVE:
        raise ConfigError(f"{path}: it is {run.state} ({run.why}); nothing to resume")
    if run.files.unreadable:
        raise ConfigError(f"{path}: unreadable: {run.files.unreadable}")
    if not run.files.starts:
        raise ConfigError(f"{path}: command.json has no start")
    start = run.files.starts[-1]
    mirror = mirror_of(run.files.conf or {})
    argv = command(start, overrides, run_dir=path.absolute(), mirror=mirror)
    try:
        os.chdir(start.folder)
    except OSError as error:
        why = error.strerror
        raise ConfigError(
            f"{path}: it was started in {start.folder}, which is gone: {why}"
        ) from error
    shown = shlex.join(masked_overrides(argv))
    print(escaped(f"distrain.runs: python -m distrain {shown}"), file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "distrain", *argv])


def command(
    start: Start, overrides: Sequence[str], *, run_dir: Path, mirror: str | None = None
) -> list[str]:
    """Return the arguments that continue one run, of a sweep too; `overrides` replace equal keys.

    Args:
        start: the start to repeat.
        overrides: further ones.
        run_dir: folder of the run.
        mirror: its place for checkpoints, which a sweep or `${now:}` may have made.

    Raises:
        ConfigError: the overrides of this run are unknown, or one of them is a secret.
    """
    if start.overrides is None:
        raise ConfigError(
            f"{run_dir}: command.json does not hold its overrides; give the command again, with "
            f"run.dir={run_dir}"
        )
    new = {_key(each) for each in overrides}
    own = [] if not mirror or _MIRROR in new else [f"{_MIRROR}={quoted(mirror)}"]
    dropped = {_key(each): each for each in start.overrides if _key(each) in new}
    replaced = {*new, *map(_key, own), "run.dir", "resume", "plan"}
    kept = [each for each in start.overrides if _key(each) not in replaced]
    hidden = [_key(each) for each in kept if MASK in each]
    if hidden:
        raise ConfigError(
            f"{', '.join(hidden)}: command.json holds no secrets; expected them again: "
            f"python -m distrain.runs resume {run_dir} {' '.join(f'{key}=...' for key in hidden)}"
        )
    added = [_signs(dropped.get(_key(each), "")) * _is_bare(each) + each for each in overrides]
    return [*_flags(start.argv), *kept, *added, *own, f"run.dir={quoted(str(run_dir))}"]


def _flags(argv: Sequence[str]) -> list[str]:
    """Return Hydra's flags and keys of a command, without those of a sweep."""
    flags: list[str] = []
    keys: list[str] = []
    for before, argument in zip(["", *argv], argv, strict=False):
        key = _key(argument)
        if before in _WITH_VALUE or key in _WITH_VALUE:
            flags.append(argument)
        elif key.startswith("hydra.") and not key.startswith(_OF_SWEEPS):
            keys.append(argument)
    return [*flags, *keys]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _signs(override: str) -> str:
    """Return the + or ++ before an override."""
    return override[: len(override) - len(override.lstrip("+"))]


def _is_bare(override: str) -> bool:
    return not override.startswith(("+", "~"))
