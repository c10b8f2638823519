"""Read files that others may have put there: regular ones only, of bounded size, never waiting.

Standard library only: the writer process imports this.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path


def open_regular(path: str | Path) -> int:
    """Return a descriptor for reading; pipes, devices and folders are refused without waiting.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO  # no retry mends either
        raise OSError(number, "not a regular file", str(path))
    return fd


def read_regular(path: str | Path, *, max_bytes: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it cannot be read, is no regular file, or has more than `max_bytes`.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(path))
    return data


def read_tail(path: str | Path, *, max_bytes: int) -> bytes:
    """Return the last bytes of a file, `max_bytes` at most; OSError as above."""
    with open(open_regular(path), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
        return file.read(max_bytes)
