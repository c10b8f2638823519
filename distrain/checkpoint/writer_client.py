"""Client of the writer process: starts it, sends requests, collects their outcomes."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distrain.checkpoint.child_process import ChildProcess

_CODE = (
    "import sys; sys.path.append(sys.argv[1]); "  # after the standard library
    "from distrain.checkpoint.writer_process import main; main(sys.argv[2:])"
)


class Request(NamedTuple):
    """A request to the writer process.

    Attributes:
        kind: "trained" is a save of a state whose end of the run is left, see `format`.
        message: see `writer_process`.
        iteration: of the checkpoint.
        scratch: name of the scratch folder that the writer uses.
    """

    kind: Literal["reserve", "save", "trained"]
    message: dict[str, Any]
    iteration: int = -1
    scratch: str = ""


class Outcome(NamedTuple):
    """Outcome of a request: None or the reason of its failure, other problems, duration."""

    request: Request
    error: str | None
    notes: list[str]
    write_s: float


class WriterProcess(ChildProcess):
    """A process that carries out requests, and outlives this one until they are done."""

    def __init__(self, staging_fd: int) -> None:
        arguments = [str(Path(__file__).resolve().parents[2]), str(staging_fd), str(os.getpid())]
        flags = ("-I", "-S")
        super().__init__("writer", _CODE, arguments, flags=flags, pass_fds=(staging_fd,))

    def close(self) -> None:
        """Wait until the process has finished its requests and ended."""
        with contextlib.suppress(OSError, ValueError):  # it died, or the pipe is closed
            # loader workers that were forked since hold the pipe open: its end does not show
            self.send()
        self.end()


class Requests:
    """Requests to a writer process, which is started on demand, and again if it died."""

    def __init__(self, staging_fd: int) -> None:
        self.writer: WriterProcess | None = None
        self._staging_fd = staging_fd
        self._sent: deque[Request] = deque()
        self._outcomes: list[Outcome] = []

    def send(self, request: Request) -> None:
        """Send a request; OSError if no writer could be started."""
        if self.writer is not None:
            try:
                self.writer.send(request.message)
            except BrokenPipeError:  # it died: its earlier requests get their outcomes first
                self._collect(wait=True)
                self.close()
        if self.writer is None:
            self.writer = WriterProcess(self._staging_fd)
            self.writer.send(request.message)
        self._sent.append(request)

    def settle(self, *, wait: bool) -> list[Outcome]:
        """Return the outcomes not returned yet; with `wait`, those of all requests sent."""
        self._collect(wait=wait)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def idle(self) -> bool:
        """Return whether every request has its outcome."""
        return not self._sent

    def _collect(self, *, wait: bool) -> None:
        while self._sent and self.writer is not None:
            try:
                answer = self.writer.receive(wait_s=None if wait else 0.0)
            except EOFError as death:
                self._outcomes += [Outcome(request, str(death), [], 0.0) for request in self._sent]
                self._sent.clear()
                self.close()
                return
            if answer is None:
                return
            self._outcomes.append(Outcome(self._sent.popleft(), **answer))

    def close(self) -> None:
        """Wait until the writer has finished its requests and ended."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
