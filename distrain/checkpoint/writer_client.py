"""Client of the writer process: starts it, sends requests, collects their outcomes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distrain.checkpoint.writer_process import IGNORED_SIGNALS

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


class WriterProcess:
    """A process that carries out requests, and outlives this one until they are done."""

    def __init__(self, staging_fd: int) -> None:
        self._pending = b""
        package_parent = str(Path(__file__).resolve().parents[2])
        arguments = ["-c", _CODE, package_parent, str(staging_fd), str(os.getpid())]
        self._errors = os.memfd_create("distrain-checkpoint-writer-errors")
        # signals stay blocked in the child until it ignores them: none kills it before
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(staging_fd,),
                start_new_session=True,  # it survives a kill of the rank's process group
                bufsize=0,
            )
        except BaseException:
            os.close(self._errors)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def send(self, request: dict[str, Any]) -> None:
        """Send a request, see `writer_process`; BrokenPipeError if the process died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def answer(self, *, wait: bool) -> dict[str, Any] | None:
        """Return the next answer; without `wait`, None if it has not arrived.

        Raises:
            EOFError: the process died; the text has its exit status and last line of stderr.
        """
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            if not wait and not select.select([fd], [], [], 0)[0]:
                return None
            data = os.read(fd, 1 << 16)
            if not data:
                raise EOFError(self._cause_of_death())
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        text = os.pread(self._errors, 1 << 16, 0).decode(errors="replace").strip()
        last = f": {text.splitlines()[-1]}" if text else ""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"the writer process (pid {self._process.pid}) {how}{last}"

    def close(self) -> None:
        """Wait until the process has finished its requests and ended."""
        with contextlib.suppress(OSError):  # it died, or the pipe is closed
            if self._process.stdin is not None and not self._process.stdin.closed:
                # loader workers that were forked since hold the pipe open: its end does not show
                self._process.stdin.write(b"\n")
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        self._process.wait()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1


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
                answer = self.writer.answer(wait=wait)
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
