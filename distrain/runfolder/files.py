"""Read run.yaml and command.json. A file that cannot be read is not a damaged one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import yaml

from distrain.errors import ConfigError, RunFailed, RunRefused
from distrain.files.retry import read_file, unreadable

# errors that the user can fix: space, quota, permissions, a wrong path
_OF_USER = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOENT"),
        *("ENOTDIR", "EEXIST", "ELOOP", "ENAMETOOLONG", "EINVAL"),
    )
)


def cannot_use(run_dir: Path, error: OSError, action: str = "") -> ConfigError | RunFailed:
    """Return ConfigError for an error that the user can fix, RunFailed if the storage fails."""
    text = f"run.dir={run_dir}: {action}{error.strerror or error}"
    return ConfigError(text) if error.errno in _OF_USER else RunFailed(text)


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file, None if it does not exist.

    Raises:
        RunFailed: it cannot be read.
    """
    try:
        return read_file(str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFailed(unreadable(path, error)) from error


def read_frozen(path: Path) -> dict[str, Any] | None:
    """Return the configuration in a run.yaml, None if it does not exist.

    Raises:
        RunFailed: it cannot be read, or is damaged.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        frozen = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError):
        frozen = None
    if not isinstance(frozen, dict):
        raise RunRefused(f"{path} is damaged: no YAML mapping; restore it, or give a new run.name")
    return frozen


def read_starts(path: Path) -> list[Any] | None:
    """Return the starts in a command.json, [] if it does not exist, None if it is damaged.

    Raises:
        RunFailed: it cannot be read.
    """
    data = read_bytes(path)
    if data is None:
        return []
    try:
        starts = json.loads(data)["starts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return starts if isinstance(starts, list) else None
