"""FolderWatch: detect that a run folder is deleted, moved or unmounted during the run."""

from __future__ import annotations

import errno
import os
import threading
import time

from distrain.errors import RunRefused
from distrain.log import logger

LOOK_S = 20.0  # between checks
WARN_S = 60.0  # between warnings
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class FolderWatch:
    """Thread that checks inside `with` that a folder exists, and logs a warning if not."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # kept open, so that its inode number is not used again
        self._fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inode = os.fstat(self._fd).st_ino
        self._was_gone = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="distrain-folder", daemon=True)

    def __enter__(self) -> FolderWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()  # not joined: a check may block forever on a dead file system
        self._was_gone = self.is_gone()
        os.close(self._fd)

    def refuse_if_gone(self) -> None:
        """Raise RunRefused if the folder was gone at the end of the `with`."""
        if self._was_gone:
            raise RunRefused(self.line())

    def is_gone(self) -> bool:
        """Return whether the path leads to another folder or none."""
        try:
            return os.stat(self._folder).st_ino != self._inode
        except OSError as error:
            return error.errno in _MISSING  # other errors say nothing of the folder

    def _look(self) -> None:
        warned = float("-inf")
        while not self._end.wait(LOOK_S):
            now = time.monotonic()
            if now - warned >= WARN_S and self.is_gone():
                warned = now
                logger.warning("%s", self.line())

    def line(self) -> str:
        """Return the message about a missing folder."""
        return (
            f"run.dir={self._folder}: this folder is gone (deleted, moved or unmounted since the "
            "start); metrics and checkpoints written since then are not in it"
        )
