"""Retry file operations with backoff. Standard library only: the writer process imports this."""

from __future__ import annotations

import errno
import time

from distrain.files.regular import open_regular

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

PAUSES_S = (0.1, 0.5, 2.0)
"""Seconds between the tries: a server of files comes back, other threads close their files."""

# These report what is at a path; every other error reports that it could not be found out.
_DEFINITE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENXIO,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    }
)


def is_definite(error: OSError) -> bool:
    """Whether an error reports what is at a path: missing, a folder, a link, a socket.

    After any other error, such as EIO, ESTALE, EACCES or EMFILE, nothing is known of the content.
    """
    return error.errno in _DEFINITE


def retried(call: Callable[[], T]) -> T:
    """Return what `call` returns; repeat it after errors that are not definite.

    Raises:
        OSError: a definite one at once, any other from the last try.
    """
    for pause_s in PAUSES_S:
        try:
            return call()
        except OSError as error:
            if is_definite(error):
                raise
        time.sleep(pause_s)
    return call()


def read_file(path: str, limit: int = -1) -> bytes:
    """Return the content of a regular file, at most `limit` bytes of it.

    Raises:
        OSError: it cannot be read, after retries, or is no regular file; the error has the path.
    """

    def read() -> bytes:
        with open(open_regular(path), "rb") as file:
            try:
                return file.read(limit)
            except OSError as error:
                error.filename = path
                raise

    return retried(read)


def unreadable(path: object, error: Exception) -> str:
    """Return the line about a file of a run that cannot be read."""
    name, why = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
    return f"{name} cannot be read: {why}; nothing was changed, run it again when it can be read"
