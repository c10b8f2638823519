"""Scratch files and folders of checkpoints: names, locks, leftovers of dead processes.

Each has a scratch name and a locked file until it is on the disk and takes its final name. A lock
ends with its process: an unlocked scratch file is a leftover. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time

from distrain.files.atomic import replacing
from distrain.files.retry import is_definite

LOCKED_FILE = "manifest.json"  # the file that is locked in a scratch folder
_PREFIX = ".tmp-"
_DELETE_PREFIX = ".tmp-delete-"
_SCRATCH = re.compile(
    r"\.tmp-(delete-)?(iter_\d{10,18}(?:\.trained)?|best\.json|run_id)-[0-9a-f]{12}"
)
_CREATED_WITHIN_S = 2.0  # a scratch folder this young may not have its locked file yet
_UNLOCKABLE_S = 600.0  # without locks, anything changed within this time is in use


def scratch_name(name: str, *, delete: bool = False) -> str:
    """Return a new scratch name for a checkpoint or file to write, or to delete."""
    return f"{_DELETE_PREFIX if delete else _PREFIX}{name}-{os.urandom(6).hex()}"


def is_scratch(name: str) -> bool:
    """Return whether `scratch_name` made this name."""
    return _SCRATCH.fullmatch(name) is not None


def create(path: str) -> int:
    """Return the descriptor of a new file, readable by others as far as the umask allows."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def lock(fd: int) -> None:
    """Lock an open file until it is closed, or its process dies."""
    with contextlib.suppress(OSError):  # no locks here: `in_use` goes by the time of change
        fcntl.flock(fd, fcntl.LOCK_EX)


def write_small(folder: str, name: str, text: str) -> None:
    """Create or replace a small file atomically; a leftover of it is recognised as one."""
    path = os.path.join(folder, name)
    with (
        contextlib.ExitStack() as opened,  # closed, and so unlocked, after the rename
        replacing(path, scratch=scratch_name(name)) as scratch,
    ):
        file = opened.enter_context(open(create(scratch), "wb"))
        lock(file.fileno())
        file.write(text.encode())
        file.flush()


def in_use(path: str) -> bool:
    """Return whether a live process writes this scratch folder or file.

    On file systems without locks, whatever changed within ten minutes counts as in use. A folder
    being deleted never does: any process may finish that.

    Raises:
        OSError: the locked file cannot be opened, so that nothing is known.
    """
    if os.path.basename(path).startswith(_DELETE_PREFIX):
        return False
    locked = os.path.join(path, LOCKED_FILE) if os.path.isdir(path) else path
    try:
        fd = os.open(locked, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if not is_definite(error):
            raise
        return _changed_within(path, seconds=_CREATED_WITHIN_S)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return _changed_within(path, seconds=_UNLOCKABLE_S)
    finally:
        os.close(fd)
    return False


def _changed_within(path: str, *, seconds: float) -> bool:
    try:
        return time.time() - os.lstat(path).st_mtime < seconds
    except OSError:
        return False


def remove(path: str) -> None:
    """Delete a scratch folder or file as far as possible; never follow a link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)
