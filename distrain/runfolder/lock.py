"""Exclusive lock of a run folder; errors name the process that holds it.

Forked ranks inherit the lock: it is held until the last of them has ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError
from distrain.files.open_regular import open_regular
from distrain.files.retry import is_definite
from distrain.run_layout import LOCK_FILE

_BEGIN = b'{"pid": '  # first bytes of the lock file
_ENDING_S = 15.0  # longest wait for the ranks of a killed command


def hold(path: Path) -> int:
    """Lock a run folder; return the descriptor, which holds the lock until it is closed.

    Raises:
        ConfigError: another process holds the lock, or the file `lock` is not a lock file.
    """
    file = path / LOCK_FILE
    deadline = time.monotonic() + _ENDING_S
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _not_ours(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                holder = _holder(fd)
            finally:
                os.close(fd)
            if _is_alive(holder) or time.monotonic() > deadline:
                raise ConfigError(
                    f"run.dir={path}: {_described(holder)} runs here already"
                ) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return fd  # a file system without locks
        if os.path.exists(file) and os.path.samestat(os.fstat(fd), os.stat(file)):
            break
        os.close(fd)  # its holder just removed it
    try:
        if not _is_ours(fd):
            raise _not_ours(path)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(mine).encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def holder(path: Path) -> dict[str, Any] | None:
    """Return pid, host and since of the process that holds the lock, as far as known, or None.

    Raises:
        OSError: the lock file cannot be read: a process may hold it or not.
    """
    try:
        fd = open_regular(path / LOCK_FILE)
    except OSError as error:
        if is_definite(error):
            return None  # no file, or one that cannot be locked: a folder, a pipe
        raise
    try:
        found = _holder(fd)
    except BaseException:
        os.close(fd)
        raise
    try:
        if found.get("host") == socket.gethostname() and not _is_alive(found):
            return None  # without a try to lock: it could make `hold` of another process fail
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return found
    except OSError:
        return found or None  # a file system without locks
    finally:
        os.close(fd)
    return None


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(
        f"run.dir={path}: its file lock is not that of a run; move it away, or give another run.dir"
    )


def _is_ours(fd: int) -> bool:
    """Return whether the lock file was written by `hold`, perhaps cut short by a power loss."""
    text = os.pread(fd, 4096, 0).strip(b"\0")
    return _BEGIN.startswith(text[: len(_BEGIN)])


def _holder(fd: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder is alive, or its state is unknown."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return True


def _described(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
