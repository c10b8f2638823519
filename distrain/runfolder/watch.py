"""Notice that a run's folder is deleted, moved or unmounted while the run goes on."""

from __future__ import annotations

import errno
import os
import threading
import time

from distrain.errors import RunRefused
from distrain.log import logger

LOOK_S = 20.0  # between two looks
WARN_S = 60.0  # between two warnings
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class FolderWatch:
    """Looks at a folder from a thread of its own, inside `with`; logs a warning while it is gone.

    Args:
        folder: exists now.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # kept open, so that the number of the folder is not given to another one
        self._fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inode = os.fstat(self._fd).st_ino
        self._was_gone = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="distrain-folder", daemon=True)

    def __enter__(self) -> FolderWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()  # not joined: on a dead file system a look may take for ever
        self._was_gone = self.is_gone()
        os.close(self._fd)

    def refuse_if_gone(self) -> None:
        """Raise RunRefused if the folder was gone at the end of the `with`."""
        if self._was_gone:
            raise RunRefused(self.line())

    def is_gone(self) -> bool:
        """Whether the path no longer leads to the folder that it led to."""
        try:
            return os.stat(self._folder).st_ino != self._inode
        except OSError as error:
            return error.errno in _MISSING  # of others nothing is known

    def _look(self) -> None:
        warned = float("-inf")
        while not self._end.wait(LOOK_S):
            now = time.monotonic()
            if now - warned >= WARN_S and self.is_gone():
                warned = now
                logger.warning("%s", self.line())

    def line(self) -> str:
        """Return the line about a folder that is gone."""
        return (
            f"run.dir={self._folder}: this folder is gone (deleted, moved or unmounted since the "
            "start); metrics and checkpoints written since then are not in it"
        )
