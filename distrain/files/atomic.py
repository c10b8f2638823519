"""Files that are whole or not there at all, whenever the process or the machine stops.

What is being written carries a scratch name and a lock, and takes its own name when it is on the
disk. The lock ends with its process, so that what a dead one left behind can be told from what a
live one works on. Standard library only, and little of it: the writer process imports this.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time

from distrain.files.retry import is_definite

_SCRATCH = re.compile(
    r"\.tmp-(delete-)?(iter_\d{10,18}(?:\.trained)?|best\.json|run_id)-[0-9a-f]{12}"
)
PREFIX = ".tmp-"
DELETE_PREFIX = ".tmp-delete-"
LOCKED_FILE = "manifest.json"  # the file in a scratch folder that its writer has locked


def scratch_name(name: str, *, delete: bool = False) -> str:
    """Return a new name for what is being written (or deleted) and will be (or was) `name`."""
    return f"{DELETE_PREFIX if delete else PREFIX}{name}-{os.urandom(6).hex()}"


def is_scratch(name: str) -> bool:
    """Say whether `scratch_name` made this name."""
    return _SCRATCH.fullmatch(name) is not None


def create(path: str) -> int:
    """Create a file that was not there; others may read it as far as the umask lets them."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def lock(fd: int) -> None:
    """Lock an open file until it is closed, which the death of the process does too."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks: `in_use` goes by the time of change there


def sync_folder(path: str) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(fd)


def write_small(folder: str, name: str, text: str) -> None:
    """Write a small file whole or not at all."""
    scratch = os.path.join(folder, scratch_name(name))
    try:
        with open(create(scratch), "wb") as file:
            lock(file.fileno())
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            os.rename(scratch, os.path.join(folder, name))
            sync_folder(folder)
    except BaseException:
        remove(scratch)
        raise


def in_use(path: str) -> bool:
    """Say whether a live writer works on this scratch folder or file.

    A writer holds a lock on the file (on the manifest, in a folder) that ends with the process.
    Where locks do not work, as on some network file systems, what changed within the last ten
    minutes counts as in use. What is being deleted never does: anybody may finish that.

    Raises:
        OSError: the locked file cannot be opened, so that nothing is known.
    """
    if os.path.basename(path).startswith(DELETE_PREFIX):
        return False
    locked = os.path.join(path, LOCKED_FILE) if os.path.isdir(path) else path
    try:
        fd = os.open(locked, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if not is_definite(error):
            raise
        return _changed_within(path, seconds=2)  # it may be about to create the file that it locks
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return _changed_within(path, seconds=600)
    finally:
        os.close(fd)
    return False


def _changed_within(path: str, *, seconds: float) -> bool:
    try:
        return time.time() - os.lstat(path).st_mtime < seconds
    except OSError:
        return False


def remove(path: str) -> None:
    """Delete a scratch folder or file, as far as that is possible; never follow a link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        os.unlink(path)
    except OSError:
        return
