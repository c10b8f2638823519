"""Retry file operations with backoff. Standard library only: the writer process imports this."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from distrain.files.open_regular import open_regular

T = TypeVar("T")

PAUSES_S = (0.1, 0.5, 2.0)
"""Pauses between attempts: a file server recovers, other threads close descriptors."""

# Only these errors say something of the path; after the others its content is unknown.
_DEFINITE = frozenset(
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENXIO", "EEXIST", "ENAMETOOLONG")
)


def is_definite(error: OSError) -> bool:
    """Return whether an error is certain about a path: nothing there, a folder, link or socket.

    After any other error, such as EIO, ESTALE, EACCES or EMFILE, the content is unknown.
    """
    return error.errno in _DEFINITE


def retried(call: Callable[[], T]) -> T:
    """Return the result of `call`; retry after errors that are not definite.

    Raises:
        OSError: a definite one at once, any other after the last attempt.
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
        OSError: it cannot be read, after retries, or is not a regular file; it has the path.
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
    """Return the message about a file of a run that cannot be read."""
    name, why = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
    return f"{name} cannot be read: {why}; nothing was changed, run it again when it can be read"
