"""The writer process seen from the training process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from distrain.checkpoint.writer_process import IGNORED_SIGNALS, perform

_CODE = (
    "import sys; sys.path.append(sys.argv[1]); "  # behind the standard library, which it is to use
    "from distrain.checkpoint.writer_process import main; main(sys.argv[2:])"
)


class Writer(Protocol):
    """What carries out requests (see `checkpoint_writer`), in their order."""

    def send(self, request: dict[str, Any]) -> None:
        """Hand over a request; OSError if there is nobody to take it."""

    def answer(self, *, wait: bool) -> dict[str, Any] | None:
        """Return the answer to the oldest request not answered yet, None if it is not there."""

    def close(self) -> None:
        """Let it finish what it was asked for, and end."""


class InlineWriter:
    """Carries out requests at once in the process of the caller.

    Args:
        staging_fd: the staging memory.
    """

    def __init__(self, staging_fd: int) -> None:
        self._staging_fd = staging_fd
        self._answers: deque[dict[str, Any]] = deque()

    def send(self, request: dict[str, Any]) -> None:
        """Carry out a request."""
        self._answers.append(perform(request, self._staging_fd))

    def answer(self, *, wait: bool) -> dict[str, Any] | None:
        """Return the answer to the oldest request not answered yet."""
        return self._answers.popleft()

    def close(self) -> None:
        """Do nothing: nothing is left to do."""


class WriterProcess:
    """Carries out requests in a process of its own, which outlives this one until they are done.

    Args:
        staging_fd: the staging memory, which the process shares.

    Raises:
        OSError: the process could not be started.
    """

    def __init__(self, staging_fd: int) -> None:
        self._pending = b""
        package_parent = str(Path(__file__).resolve().parents[2])
        arguments = ["-c", _CODE, package_parent, str(staging_fd), str(os.getpid())]
        self._errors = os.memfd_create("distrain-checkpoint-writer-errors")
        # blocked signals stay blocked in the child until it ignores them: none kills it before
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=(staging_fd,),
                start_new_session=True,  # what ends the group of the rank lets it finish
                bufsize=0,
            )
        except BaseException:
            os.close(self._errors)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, request: dict[str, Any]) -> None:
        """Hand over a request; BrokenPipeError if the process died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def answer(self, *, wait: bool) -> dict[str, Any] | None:
        """Return the answer to the oldest request not answered yet.

        Args:
            wait: wait for it; otherwise None comes back if it is not there yet.

        Raises:
            EOFError: the process died; the text says how.
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
        return f"the writer process (pid {self.pid}) {how}{last}"

    def close(self) -> None:
        """Let the process finish what it was asked for, and wait until it has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        self._process.wait()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1


class Request(NamedTuple):
    """Something that the writer is asked for.

    Attributes:
        kind: what it is.
        message: what the writer gets.
        iteration: the checkpoint that it is about.
        scratch: the name of the folder that the writer works in.
    """

    kind: Literal["reserve", "save", "trained"]
    message: dict[str, Any]
    iteration: int = -1
    scratch: str = ""


class Outcome(NamedTuple):
    """What became of a request.

    Attributes:
        request: the request.
        error: why it failed, None if it did not.
        notes: what went wrong without harm.
        write_s: the seconds that it took.
    """

    request: Request
    error: str | None
    notes: list[str]
    write_s: float


class Requests:
    """The requests that a writer was given; it is started when needed, and again if it died.

    Args:
        staging_fd: the staging memory.
        background: use a process; otherwise a request is carried out when it is sent.
    """

    def __init__(self, staging_fd: int, *, background: bool) -> None:
        self._staging_fd = staging_fd
        self._background = background
        self._writer: Writer | None = None
        self._waiting: deque[Request] = deque()
        self._outcomes: list[Outcome] = []

    @property
    def writer(self) -> Writer | None:
        """The writer, None if there is none now."""
        return self._writer

    def send(self, request: Request) -> None:
        """Give the writer a request.

        Raises:
            OSError: no writer could be started.
        """
        if self._writer is not None:
            try:
                self._writer.send(request.message)
                self._waiting.append(request)
                return
            except BrokenPipeError:
                self._collect(wait=True)  # it died: learn what became of the requests before
                self._drop_writer()
        started = (WriterProcess if self._background else InlineWriter)(self._staging_fd)
        self._writer = started
        started.send(request.message)
        self._waiting.append(request)

    def settle(self, *, wait: bool) -> list[Outcome]:
        """Return the outcomes that were not returned yet.

        Args:
            wait: wait for those of all requests; otherwise return those that are there.
        """
        self._collect(wait=wait)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def idle(self) -> bool:
        """Say whether nothing was asked for that has no outcome yet."""
        return not self._waiting

    def _collect(self, *, wait: bool) -> None:
        while self._waiting and self._writer is not None:
            try:
                answer = self._writer.answer(wait=wait)
            except EOFError as death:
                self._outcomes += [
                    Outcome(request, str(death), [], 0.0) for request in self._waiting
                ]
                self._waiting.clear()
                self._drop_writer()
                return
            if answer is None:
                return
            self._outcomes.append(Outcome(self._waiting.popleft(), **answer))

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Let the writer finish what it was asked for, and end."""
        self._drop_writer()
