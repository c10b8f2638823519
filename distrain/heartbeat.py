"""Heartbeat of a rank: phase and iteration in shared memory, which its agent reads.

No message, lock or thread: the last record of a rank that is suspended or stuck in a collective can
still be read. The rank unlinks the file when it has opened it; both processes keep it mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

VARIABLE = "DISTRAIN_HEARTBEAT"
"""Environment variable with the path of a rank's file."""

# Native: each field is one aligned store of 8 bytes. The phase comes first: half a record may read
# as END with the iteration before, but never as a phase of the loop with the end's iteration.
_RECORD = struct.Struct("@qqdq")
_pack, _now = _RECORD.pack_into, time.monotonic

NUM_BYTES = _RECORD.size
"""Size of the file; all zeros before the first beat."""


class Phase(IntEnum):
    """Phase of a rank, in the order of one iteration."""

    NONE = 0
    START = 1
    DATA = 2
    FORWARD = 3
    BACKWARD = 4
    OPTIMIZER = 5
    HOOKS = 6
    EVALUATION = 7
    SAVING = 8
    END = 9


class Beat(NamedTuple):
    """Last record of a rank."""

    iteration: int  # current one; in END the number of iterations done
    phase: Phase  # NONE before the first record
    time_s: float  # of the record, on this machine's monotonic clock
    finished: bool  # whether the rank's job has returned


class Pulse:
    """Heartbeat of a process without an agent: records nothing.

    Attributes:
        iteration: of every record.
    """

    iteration: int = 0

    def beat(self, phase: int, /) -> None:
        """Record progress in a phase."""

    def phase(self, phase: int, /) -> contextlib.AbstractContextManager[None]:
        """Be in a phase inside `with`, then in the previous one."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Record that the job has returned."""


class Heartbeat(Pulse):
    """Heartbeat in the file at `path`, which is unlinked; a beat takes about 0.2 us."""

    __slots__ = ("_map", "iteration")

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), NUM_BYTES)
        self.iteration = 0
        os.unlink(path)
        with contextlib.suppress(OSError):  # the last rank removes the folder
            os.rmdir(os.path.dirname(path))

    def beat(self, phase: int, /) -> None:
        _pack(self._map, 0, phase, self.iteration, _now(), 0)

    @contextlib.contextmanager
    def phase(self, phase: int, /) -> Iterator[None]:
        before = _RECORD.unpack_from(self._map)[0]
        self.beat(phase)
        try:
            yield
        finally:
            self.beat(before)

    def finish(self) -> None:
        phase, iteration, _, _ = _RECORD.unpack_from(self._map)
        _pack(self._map, 0, phase, iteration, _now(), 1)


class ObservedHeartbeat(Pulse):
    """Heartbeat that also calls listeners.

    Attributes:
        inner: the heartbeat itself.
        listeners: called with the phase of each `beat`, not of `phase`.
    """

    def __init__(self, inner: Pulse) -> None:
        self.inner = inner
        self.listeners: list[Callable[[int], None]] = []

    @property
    def iteration(self) -> int:
        return self.inner.iteration

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self.inner.iteration = iteration

    def beat(self, phase: int, /) -> None:
        self.inner.beat(phase)
        for listener in self.listeners:
            listener(phase)

    def phase(self, phase: int, /) -> contextlib.AbstractContextManager[None]:
        return self.inner.phase(phase)

    def finish(self) -> None:
        self.inner.finish()


_own = Pulse()


def current() -> Pulse:
    """Return the heartbeat of this process."""
    global _own
    # removed from the environment: children of a rank are not the rank
    path = os.environ.pop(VARIABLE, None)
    if path is not None:
        _own = Heartbeat(path)
    return _own


def read(file: int) -> Beat:
    """Return the last record in a file, given by its descriptor."""
    phase, iteration, time_s, finished = _RECORD.unpack(os.pread(file, NUM_BYTES, 0))
    return Beat(iteration, Phase(phase), time_s, bool(finished))
