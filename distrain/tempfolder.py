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
    """Give the path of a temporary folder, which also takes the sockets of multiprocessing.

    That holds for this process and all that it starts by multiprocessing, loader workers of ranks
    included: each would otherwise make a folder of its own, and leave it when it is killed. It lies
    in /tmp where TMPDIR is too long for the path of a socket.
    """
    config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _MAX_PARENT_BYTES and os.access("/tmp", os.W_OK):
        parent = "/tmp"
    with TemporaryFolder(parent=parent) as path:
        before = config.get("tempdir")
        config["tempdir"] = path
        try:
            yield path
        finally:
            config["tempdir"] = before


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
