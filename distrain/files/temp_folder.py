"""Temporary folders that a killed process leaves to the next one, which removes them.

A process that ends by kill -9 cleans up nothing. So each folder holds a file that its process, and
the children that it forks, keep locked; whoever makes a folder in the same place, or ends one,
removes those that nobody keeps any more. Folders of other users, of other hosts and of other
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
from types import TracebackType
from typing import Any

_PREFIX = "distrain"
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_LOCK_FILE = ".distrain-lock"
# a socket's path has 107 bytes at most (linux/un.h); two names of ours and multiprocessing's follow
_MAX_PARENT_BYTES = 107 - len("/distrain-01234567/listener-01234567")


class TemporaryFolder:
    """A folder for this user alone, removed at the end of the `with`.

    Args:
        purpose: a part of its name.
        parent: the folder that it is made in; None: the one for temporary files, see TMPDIR.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, purpose: str = "", *, parent: str | None = None) -> None:
        parent = tempfile.gettempdir() if parent is None else parent
        _remove_abandoned(parent)
        self.path = tempfile.mkdtemp(prefix=f"{_PREFIX}-{purpose}", dir=parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._lock = os.open(os.path.join(self.path, _LOCK_FILE), flags, 0o600)
        with contextlib.suppress(OSError):  # no locks or no space here: then nobody removes it
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock, socket.gethostname().encode())

    def __enter__(self) -> str:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove it; a second call does nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1
        _remove_abandoned(os.path.dirname(self.path))


@contextlib.contextmanager
def folder_of_processes() -> Iterator[str]:
    """Have what `tempfile` and multiprocessing make lie in a temporary folder; yield its path.

    That holds for this process and the ranks and loader workers that come of it: a killed one would
    leave its files and its folder of sockets behind. The cache of torch.compile stays where it is,
    for the next run. The folder lies in /tmp where TMPDIR is too long for the path of a socket.
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
    """Use the folder of the process that has started this one; a spawned one knows it only so."""
    path = _config_of_process().get("tempdir")
    if path is not None:
        tempfile.tempdir = path


def _config_of_process() -> dict[str, Any]:
    """Return what multiprocessing hands on to every process that it starts."""
    config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    return config


def _remove_abandoned(parent: str) -> None:
    """Remove the folders whose process, on this host and of this user, is gone."""
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
        # the name is written under the lock: who has none yet is just being made
        if os.pread(fd, 256, 0) != socket.gethostname().encode():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
