"""Standard streams that never fail: a lost console must not end a run or change its exit code.

The reader of a pipe may have ended (EPIPE), the terminal may be lost (EIO), the disk full (ENOSPC),
or the descriptors closed by a daemon that starts the command.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import IO, Any

_DESCRIPTORS = {"stdout": 1, "stderr": 2}
_STUCK_S = 5.0  # of a terminal that accepts nothing, until output is dropped


def protect() -> None:
    """Make stdout and stderr of this process lossy; point closed descriptors to /dev/null.

    Streams replaced by a caller are kept.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # otherwise the next file or socket gets the number, and output goes into it
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
            os.set_inheritable(number, True)
    for name, number in _DESCRIPTORS.items():
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            flush(stream)
            setattr(sys, name, lossy(number, encoding=getattr(stream, "encoding", None)))


def redirect(file: IO[bytes]) -> None:
    """Redirect stdout and stderr of this process, native code included, to a file."""
    for name, number in _DESCRIPTORS.items():
        flush(getattr(sys, name))
        os.dup2(file.fileno(), number)
        setattr(sys, name, lossy(number))


def flush(stream: Any) -> None:
    """Flush a stream or None; ignore errors."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def lossy(number: int, *, encoding: str | None = None) -> io.TextIOWrapper:
    """Return a text stream to a descriptor that drops output on errors."""
    raw = _Lossy(_unblocked(number), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=True
    )


def _unblocked(number: int) -> int:
    """Return a descriptor of the same terminal with non-blocking writes; else `number`."""
    # After Ctrl-S, or a lost connection, a write would wait for ever. Blocking is a property of the
    # open file, which other processes share: open it again.
    with contextlib.suppress(OSError):
        if os.isatty(number):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{number}", flags)
    return number


def notify(text: str) -> None:
    """Write to stderr from a signal handler: does not raise, does not wait for a reader."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0) == [(2, select.POLLOUT)]:
            os.write(2, text.encode())


class _Lossy(io.FileIO):
    """File that drops output on errors, and ends an incomplete line before the next one."""

    _is_torn = False
    _is_stuck = False

    def write(self, data: Any, /) -> int:
        written: int | None
        rest = memoryview(data).cast("B")
        num = len(rest)
        try:
            if self._is_torn:
                super().write(b"\n")
                self._is_torn = False
            while rest:
                written = super().write(rest)
                if written is None:  # the reader is slow, or has stopped
                    wait_s = 0.0 if self._is_stuck else _STUCK_S
                    self._is_stuck = not select.select([], [self], [], wait_s)[1]
                    if self._is_stuck:
                        raise BlockingIOError(errno.EAGAIN, "the reader has stopped")
                    continue
                self._is_stuck = False
                rest = rest[written:]
        except OSError:
            self._is_torn |= 0 < len(rest) < num
        return num


def for_reader(command: Callable[[], int]) -> int:
    """Return the exit code of a command; 0 if the reader of stdout leaves, as in `... | head`."""
    try:
        code = command()
        sys.stdout.flush()  # here, not at the end of the process, which would report it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
