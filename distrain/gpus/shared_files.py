"""Locked files in a directory that all users of the machine share. Standard library only.

A lock (flock) belongs to an open file: the kernel ends it with the last process that has the file
open. A child process that is forked closes the files, so that it does not hold the locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from distrain.errors import ConfigError

VARIABLE = "DISTRAIN_LEASES"
"""Environment variable: the directory, in place of `folder`'s choice."""

_NAME = "distrain-gpus"
_PARENTS = ("/run/lock", "/tmp")
_MODE = 0o1777
_FILE_MODE = 0o1666  # systemd removes files of /tmp after 10 days, but none with the sticky bit
_MUTEX = "mutex"
MUTEX_HEAD = 20
"""Bytes at the beginning of the mutex file that belong to `mutex`."""
MUTEX_S = 30.0
"""Limit of the wait for the mutex, which a process holds for milliseconds."""
_PAUSE_S = 0.01
_OPEN_TRIES = 20  # another process may remove the file meanwhile

_locked: set[int] = set()  # descriptors


def folder_path() -> Path:
    """Return the path of the directory of the leases, which need not exist."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen) if chosen else Path(_parent(), _NAME)


def folder() -> Path:
    """Return the directory of the leases, created if it is missing: sticky, writable for all.

    Raises:
        ConfigError: it cannot be used.
    """
    path = folder_path()
    if not path.is_absolute():  # a directory of its own for each working directory
        raise ConfigError(f"{VARIABLE}={path}: expected an absolute path, the same for all users")
    try:
        if not path.exists():
            with contextlib.suppress(FileExistsError), _no_umask():
                path.mkdir(_MODE)
        found = path.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if is_own and not os.environ.get(VARIABLE) and stat.S_IMODE(found.st_mode) != _MODE:
            path.chmod(_MODE)  # Docker creates a missing directory that it mounts for root alone
            found = path.lstat()
    except OSError as error:
        raise unusable(path, error) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path}: expected a directory, for the leases of GPUs; remove it")
    is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if is_open and not found.st_mode & stat.S_ISVTX:  # others could remove the files of a holder
        raise ConfigError(f"{path}: expected a sticky directory; its owner can: chmod 1777 {path}")
    return path


@contextlib.contextmanager
def _no_umask() -> Iterator[None]:
    """Create files with their final mode at once: a process may be killed before a chmod."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def _parent() -> str:
    """Return the first parent that has the directory, or in which every user can create it."""
    # by the mode, not by access: root must find the same as all others
    for parent in _PARENTS:
        with contextlib.suppress(OSError):
            mode = os.stat(parent).st_mode
            is_for_all = mode & stat.S_IWOTH and mode & stat.S_ISVTX
            if is_for_all or os.path.isdir(os.path.join(parent, _NAME)):
                return parent
    return _PARENTS[-1]


def unusable(path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """Return the error of a file or directory that cannot hold leases."""
    fix = f"its owner can: chmod 1777 {folder_path()}; " if error.errno == errno.EACCES else ""
    return ConfigError(
        f"{path}: the leases of GPUs cannot be kept here: {error.strerror}; {fix}{VARIABLE}=DIR "
        "names another directory for all users, launch.share=true starts without leases"
    )


@contextlib.contextmanager
def mutex(path: Path, patience_s: float = MUTEX_S) -> Iterator[int]:
    """Exclude all other processes from the directory `path` inside `with`; yield the descriptor.

    The first 20 bytes of the file are the process id of the last holder; the rest is the caller's.

    Raises:
        ConfigError: a file cannot be used, or another process holds the mutex for long.
    """
    file = path / _MUTEX
    deadline_s = time.monotonic() + patience_s
    try:
        while (fd := try_lock(file)) is None:
            if time.monotonic() > deadline_s:
                pid = file.read_text(errors="replace").partition("\n")[0].strip()
                raise ConfigError(
                    f"{file}: locked by another process for {patience_s:g} s, the last one was "
                    f"{pid if pid.isdigit() else 'unknown'}; if it is stopped, continue or end it"
                )
            time.sleep(_PAUSE_S)
        try:
            os.pwrite(fd, f"{os.getpid():<{MUTEX_HEAD - 1}}\n".encode(), 0)
            yield fd
        finally:
            close(fd)
    except OSError as error:
        raise unusable(error.filename or file, error) from error


def try_lock(path: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """Lock a file, which is created if it is missing; return its descriptor for `close`.

    Args:
        path: in the directory.
        kind: LOCK_EX, or LOCK_SH for a lock that several processes hold.

    Returns:
        None if another process holds a lock that excludes this one.
    """
    while True:
        fd = open_shared(path)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        if is_at(fd, path):
            _locked.add(fd)
            return fd
        os.close(fd)  # it was removed meanwhile


def is_at(fd: int, path: Path) -> bool:
    """Return whether a descriptor is of the file at a path, which may be removed."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False


def share(fd: int) -> None:
    """Turn an exclusive lock into one that other processes of the run can hold too."""
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def close(fd: int) -> None:
    """Close a descriptor of `try_lock`; the lock ends with the last process that holds it."""
    _locked.discard(fd)
    os.close(fd)


def open_shared(path: Path) -> int:
    """Open a file for reading and writing, which any user may do; create it if it is missing."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(_OPEN_TRIES):
        try:
            # not with O_CREAT: in a sticky directory the kernel refuses that for files of other
            # users (fs.protected_regular)
            fd = os.open(path, flags)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError), _no_umask():
                os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, _FILE_MODE))
            continue
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        break
    raise OSError(errno.ENXIO, "not a regular file", str(path))


def _close_in_child() -> None:
    for fd in _locked:
        os.close(fd)
    _locked.clear()


os.register_at_fork(after_in_child=_close_in_child)
