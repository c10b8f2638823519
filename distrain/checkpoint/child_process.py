"""Child process of a rank: reads lines, answers with lines of JSON; its death is reported."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from distrain.checkpoint.writer_process import IGNORED_SIGNALS

_KILL_S = 5.0  # longest wait for a killed process to end


class ChildProcess:
    """A Python process in a session of its own, which no signal to the rank's group ends.

    Args:
        name: in messages and of its memory, as "writer".
        code: that it runs.
        arguments: `sys.argv[1:]` of the code.
        flags: of the interpreter.
        pass_fds: descriptors that it inherits.

    Attributes:
        pid: its process id.
    """

    def __init__(
        self,
        name: str,
        code: str,
        arguments: Sequence[str],
        *,
        flags: Sequence[str] = ("-I",),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._name, self._pending = name, b""
        self._errors = os.memfd_create(f"distrain-{name}-errors")
        # signals stay blocked in the child until it ignores them: none kills it before
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", code, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=pass_fds,
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(self._errors)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = self._process.pid

    def send(self, message: dict[str, Any] | None = None) -> None:
        """Send a message as a line of JSON, or an empty line.

        Raises:
            BrokenPipeError: the process died.
            ValueError: it was ended by `end`.
        """
        assert self._process.stdin is not None
        line = b"" if message is None else json.dumps(message).encode()
        self._process.stdin.write(line + b"\n")

    def receive(self, *, wait_s: float | None) -> dict[str, Any] | None:
        """Return the next answer; None if it has not arrived within `wait_s` (None: wait for it).

        Raises:
            EOFError: the process died; the text has its exit status and last line of stderr.
            ValueError: it was ended by `end`.
        """
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        ready = select.poll()  # select() fails for descriptors from 1024 on
        ready.register(fd, select.POLLIN)
        while b"\n" not in self._pending:
            if wait_s is not None and not ready.poll(1000 * wait_s):
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
        return f"the {self._name} process (pid {self.pid}) {how}{last}"

    def kill(self) -> None:
        """Kill the process, and release it as `end` does."""
        self._process.kill()
        # one that waits for a file server which hangs ends when the server answers
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.end(timeout_s=_KILL_S)

    def end(self, *, timeout_s: float | None = None) -> None:
        """Close the pipes and wait for the end; subprocess.TimeoutExpired after `timeout_s`."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1
        self._process.wait(timeout_s)
