"""Temporary folders; leftovers of killed processes are removed by the next one.

Each folder has a file that is locked by its process and its forked children. A process that creates
or closes a folder removes unlocked ones in the same place; folders of other users, hosts and
programs are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

_PREFIX = "distrain"
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_LOCK_FILE = ".distrain-lock"
# a socket's path has at most 107 bytes (linux/un.h), two names after the parent included
_MAX_PARENT_BYTES = 107 - len("/distrain-01234567/listener-01234567")


class TemporaryFolder:
    """A folder private to the user, in `parent` or TMPDIR, removed at the end of the `with`."""

    def __init__(self, purpose: str = "", *, parent: str | None = None) -> None:
        parent = tempfile.gettempdir() if parent is None else parent
        _remove_abandoned(parent)
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}-{purpose}", dir=parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._lock = os.open(os.path.join(self.path, _LOCK_FILE), flags, 0o600)
        with contextlib.suppress(OSError):  # without locks or space, it is never removed
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock, socket.gethostname().encode())

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1
        _remove_abandoned(os.path.dirname(self.path))


@contextlib.contextmanager
def folder_of_processes() -> Iterator[str]:
    """Set the folder of `tempfile` and multiprocessing to a temporary folder; yield its path.

    For this process, its ranks and loader workers: a killed one would leave files and sockets. The
    cache of torch.compile stays in place for the next run. If TMPDIR is too long for the path of a
    socket, the folder lies in /tmp.
    """
    config = _config_of_process()
    parent = tempfile.gettempdir()
    cache = os.environ.get(_CACHE)
    os.environ.setdefault(_CACHE, os.path.join(parent, f"torchinductor_{os.getuid()}"))
    is_long = len(os.fsencode(parent)) > _MAX_PARENT_BYTES and os.access("/tmp", os.W_OK)
    before = tempfile.tempdir, config.get("tempdir")
    try:
        with TemporaryFolder(parent="/tmp" if is_long else parent) as path:
            tempfile.tempdir = config["tempdir"] = path
            yield path
    finally:
        tempfile.tempdir, config["tempdir"] = before
        if cache is None:
            del os.environ[_CACHE]


def use_inherited() -> None:
    """Use the folder of the parent process, in a spawned process."""
    path = _config_of_process().get("tempdir")
    if path is not None:
        tempfile.tempdir = path


def _config_of_process() -> dict[str, Any]:
    """Return the settings that multiprocessing passes to each process that it starts."""
    config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    return config


def _remove_abandoned(parent: str) -> None:
    """Remove the folders of dead processes of this user on this host."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(_PREFIX) and _is_abandoned(os.path.join(parent, name)):
                shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _is_abandoned(path: str) -> bool:
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        fd = os.open(os.path.join(path, _LOCK_FILE), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # a folder without a host name is just being created
        if os.pread(fd, 256, 0) != socket.gethostname().encode():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
