"""A file that grows by whole records only, whatever the disk or a kill does to the process."""

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
    """A file to which records are appended; a reader never meets a torn one in its middle.

    One `flush` is one system call in the ordinary case, so kill -9 tears no record. A write that
    fails half way, on a full disk, is taken back; its records wait in memory (64 MiB at most, then
    they are dropped with a warning) and go out with the first flush that succeeds. A file that
    cannot be opened now, for want of space, rights or handles, is opened by such a flush.

    Args:
        path: the file; made with its folder if it is missing, continued if it is there. Or what
            returns it; called when the file is opened, an OSError of it is as one of the opening.
        exclusive: refuse a file that is there.
        prepare: called before the file is opened; an OSError of it is as one of the opening.

    Raises:
        FileExistsError: of an exclusive file.
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
        self._size = 0  # what is written and whole
        self._num_lost = 0
        self._is_torn = self._is_closed = False
        # append may run in another thread than flush: both ends of a deque are safe without a lock
        self._waiting: deque[bytes] = deque()
        try:
            self._open()
        except FileExistsError:
            raise
        except OSError:
            pass  # the first flush tries again, and tells

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
        """Let a record wait for the next `flush`; touches no disk."""
        self._waiting.append(record)

    def flush(self) -> None:
        """Hand all waiting records to the operating system.

        Raises:
            OSError: nothing was written, the records wait on.
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
                self._take_back()
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as error:
            error.filename = error.filename or str(self.path)
            if len(data) <= MAX_WAITING_BYTES:
                self._waiting.extendleft(reversed(records))
            else:
                self._num_lost += len(records)
                logger.warning("%s: %d bytes that cannot be written are lost", self.path, len(data))
            if done:
                self._is_torn = True
                with contextlib.suppress(OSError):  # or else the next flush does it
                    self._take_back()
            raise
        self._size += done

    def _take_back(self) -> None:
        """Remove what half a record has left at the end."""
        os.ftruncate(self._fd, self._size)
        self._is_torn = False

    def close(self) -> None:
        """Flush, wait until the data is on the disk, and close; a second call does nothing.

        Raises:
            OSError: the text has how many records are lost; the file is closed all the same.
        """
        if self._is_closed:
            return
        try:
            self.flush()
            os.fsync(self._fd)
        except OSError as error:
            num = self._num_lost + len(self._waiting)
            lost = f"{num} records are lost" if num else "what was written last may be lost"
            raise OSError(error.errno, f"{lost}: {error.strerror}", str(self.path)) from error
        finally:
            self._is_closed = True
            if self._fd >= 0:
                os.close(self._fd)
