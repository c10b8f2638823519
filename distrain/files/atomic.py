"""Atomic, fsynced file creation. Standard library only: the checkpoint writer imports this."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, scratch: str = "", sync: bool = True
) -> Iterator[str]:
    """Yield a scratch path; its file takes the place of `path` at the end of the `with`.

    An exception in the `with` removes the scratch file and leaves the old file as it is.

    Args:
        path: the file to create or replace.
        scratch: name of the scratch file, in the same folder; "" for a hidden name of the process.
        sync: wait for the disk; False where the file needs to survive a kill, but no power cut.
    """
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, scratch or f".{name}.{os.getpid()}")
    try:
        yield scratch
        if sync:
            _sync(scratch, os.O_RDONLY)
        os.replace(scratch, path)
        if sync:
            sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def write(
    path: str | os.PathLike[str], data: bytes, *, mode: int = 0o666, sync: bool = True
) -> None:
    """Create or replace a file with permissions `mode` less the umask; see `replacing`."""
    with replacing(path, sync=sync) as scratch:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(data)


def sync_folder(path: str) -> None:
    """Wait until the names in a folder are on the disk."""
    try:
        _sync(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
