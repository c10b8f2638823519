"""Read regular files only, of bounded size, without blocking. Standard library only."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> int:
    """Return a descriptor for reading; OSError, without blocking, for a pipe, device or folder.

    With `follow=False`, a symbolic link is refused, too.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO  # definite: no retries
        raise OSError(number, "not a regular file", str(path))
    return fd


def read_regular(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Return the content of a regular file; OSError for any other, or over `max_bytes`."""
    with open(open_regular(path), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(path))
    return data


def read_tail(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Return the last bytes of a file, at most `max_bytes`; OSError as above."""
    with open(open_regular(path), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
        return file.read(max_bytes)
