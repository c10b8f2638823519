"""Garbage collection around imports: torch makes a million objects that stay to the end.

Collections that search them while they are made take a third of the time of the import, and the
two at the end of the process as long as a second.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import inside `with`: nothing is collected, and later collections skip the objects made.

    Nor does the end of this process search anything: its memory is returned anyway. A process that
    is forked afterwards shares their memory, as its collections do not write to it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.unregister(gc.freeze)  # once, however many imports there are
        atexit.register(gc.freeze)
        if was_enabled:
            gc.enable()
