"""Provenance of a run: command, versions, state of the git repository."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

_PACKAGES = ("distrain", "torch", "numpy", "hydra-core", "tensorboard", "safetensors")
_MAX_DIFF_BYTES = 5_000_000
LEFT_OUT = "left out:"
"""First words in place of a diff that is too long."""


def start_record(argv: Sequence[str], git: dict[str, Any] | None) -> dict[str, Any]:
    """Return the JSON record of a start of the command `argv`; `git` as `git_state` returns it."""
    return {
        "argv": list(argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "user": _user(),
        "pid": os.getpid(),
        "python": f"{platform.python_version()} {sys.executable}",
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "git": git,
    }


def git_state(folder: str) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON record of the git repository around a folder, or None; diff from HEAD."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, ""
    diff = _git(folder, "diff", "HEAD") or ""
    if len(diff) > _MAX_DIFF_BYTES:
        diff = f"{LEFT_OUT} {len(diff)} bytes\n"
    untracked = (_git(folder, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {"commit": commit.strip(), "changed": bool(diff), "untracked": untracked[:100]}, diff


def _git(folder: str, *arguments: str) -> str | None:
    """Return the output of git, None if it fails, is missing or takes too long."""
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_PAGER": "cat"}
    command = ["git", "-C", folder, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, env=env, timeout=10, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name in a container
        return str(os.getuid())
