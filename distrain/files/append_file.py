"""AppendFile: crash-safe append-only file; each record is written completely or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 64 * 2**20


class AppendFile:
    """A file to which whole records are appended.

    A `flush` is usually one system call: kill -9 leaves no partial record. A partial write, as on a
    full disk, is truncated; its records stay in memory (at most 64 MiB, then they are dropped with
    a warning) until a flush succeeds, which also opens a file that could not be opened before.

    Args:
        path: the file, created with its folder, or a function that returns it, called when the file
            is opened.
        exclusive: the file must not exist, else FileExistsError.
        prepare: called before the file is opened. An OSError of it, or of the function, counts as a
            failure to open the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Callable[[], Path],
        *,
        exclusive: bool = False,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._locate = path if callable(path) else lambda: Path(path)
        self.path = Path() if callable(path) else Path(path)
        self._flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_EXCL if exclusive else 0)
        self._prepare = prepare
        self._fd = -1
        self._size = 0  # bytes of complete records
        self._num_lost = 0
        self._is_torn = self._is_closed = False
        # append and flush may run in different threads: deques need no lock
        self._waiting: deque[bytes] = deque()
        try:
            self._open()
        except FileExistsError:
            raise
        except OSError:
            pass  # the first flush tries again, and raises

    def _open(self) -> None:
        self.path = self._locate()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._prepare()
        fd = os.open(self.path, self._flags, 0o666)
        try:
            self._size = os.fstat(fd).st_size
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def append(self, record: bytes) -> None:
        """Queue a record for the next `flush`; does not access the disk."""
        self._waiting.append(record)

    def flush(self) -> None:
        """Write all queued records.

        Raises:
            OSError: nothing was written; the records stay queued.
        """
        if self._is_closed:
            return
        records = [self._waiting.popleft() for _ in range(len(self._waiting))]
        data = memoryview(b"".join(records))
        done = 0
        try:
            if self._fd < 0:
                self._open()
            if self._is_torn:
                self._truncate()
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as error:
            error.filename = error.filename or str(self.path)
            if len(data) <= MAX_WAITING_BYTES:
                self._waiting.extendleft(reversed(records))
            else:
                self._num_lost += len(records)
                logger.warning(
                    "%s: %d bytes could not be written and are lost", self.path, len(data)
                )
            if done:
                self._is_torn = True
                with contextlib.suppress(OSError):  # the next flush tries again
                    self._truncate()
            raise
        self._size += done

    def _truncate(self) -> None:
        """Remove a partial record from the end."""
        os.ftruncate(self._fd, self._size)
        self._is_torn = False

    def close(self) -> None:
        """Flush, wait for the disk, and close.

        Raises:
            OSError: the text has the number of lost records; the file is closed.
        """
        if self._is_closed:
            return
        try:
            self.flush()
            os.fsync(self._fd)
        except OSError as error:
            num = self._num_lost + len(self._waiting)
            lost = f"{num} records are lost" if num else "the last records may be lost"
            raise OSError(error.errno, f"{lost}: {error.strerror}", str(self.path)) from error
        finally:
            self._is_closed = True
            if self._fd >= 0:
                os.close(self._fd)
