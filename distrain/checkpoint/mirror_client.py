"""Client of the mirror process: starts it, sends signals, receives its events."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from distrain.checkpoint.writer_process import IGNORED_SIGNALS

_CODE = (
    "import json, sys; "
    "sys.path += [path for path in json.loads(sys.argv[1]) if path not in sys.path]; "
    "from distrain.checkpoint.mirror_process import main; main(sys.argv[2:])"
)


class MirrorProcess:
    """A process that carries out one task, see `mirror_process.main`; killed by `close`."""

    def __init__(self, **task: Any) -> None:
        self._pending = b""
        self._errors = os.memfd_create("distrain-mirror-errors")
        paths = json.dumps([*sys.path, str(Path(__file__).resolve().parents[2])])
        arguments = [paths, json.dumps({**task, "parent": os.getpid()})]
        # signals stay blocked in the child until it ignores them: none kills it before
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CODE, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(self._errors)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def go_on(self) -> None:
        """Signal the process to go on, or to finish."""
        assert self._process.stdin is not None
        # the next event reports its death; closed if another thread starts it again
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(b"\n")

    def event(self, *, wait_s: float) -> dict[str, Any] | None:
        """Return the next event; None if there is none within `wait_s`.

        Raises:
            EOFError: the process died; the text has its exit status and last line of stderr.
        """
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            if not select.select([fd], [], [], wait_s)[0]:
                return None
            data = os.read(fd, 1 << 16)
            if not data:
                raise EOFError(self._cause_of_death())
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        text = os.pread(self._errors, 1 << 16, 0).decode(errors="replace").strip()
        last = f": {text.splitlines()[-1]}" if text else ""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"the mirror process (pid {self._process.pid}) {how}{last}"

    def close(self) -> None:
        """Kill the process; an upload that is cut off has no manifest."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1
