"""Mirror of a run's checkpoints in an object store: uploads during training, fetch at its start.

Nothing here touches the store: the mirror process does. Training never waits for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distrain.checkpoint.catalog import find_all
from distrain.checkpoint.child_process import ChildProcess
from distrain.checkpoint.format import iteration_of
from distrain.checkpoint.mirror_process import MAX_BACKOFF_S
from distrain.checkpoint.retention import read_run_id
from distrain.errors import RunFailed

_log = logging.getLogger("distrain")

POLL_S = 1.0
"""Seconds between two values of the generators of `Fetch`, at most."""

STALL_S = 1800.0  # without an event, as while a download is verified, a fetch has failed
_WARN_EVERY = 10  # failures in a row
_CODE = (
    "import json, sys; "
    "sys.path += [path for path in json.loads(sys.argv[1]) if path not in sys.path]; "
    "from distrain.checkpoint.mirror_process import main; main(sys.argv[2:])"
)


class MirrorUnreadable(Exception):
    """The store cannot be read: whether it holds checkpoints is unknown. The text is the reason."""


class MirrorRefused(Exception):
    """The mirror cannot be used for this run; the text is the reason."""


class MirrorProcess(ChildProcess):
    """A process that carries out one task, see `mirror_process.main`; it answers with events."""

    def __init__(self, **task: Any) -> None:
        paths = json.dumps([*sys.path, str(Path(__file__).resolve().parents[2])])
        super().__init__("mirror", _CODE, [paths, json.dumps({**task, "parent": os.getpid()})])

    def go_on(self) -> None:
        """Signal the process to go on, or to finish."""
        # the next event reports its death; closed if another thread starts it again
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.send()


class Mirror:
    """Uploads of a run's checkpoints, by a process of its own; on rank 0 only.

    Failures are logged, counted and retried; they never end the training.

    Args:
        url: of the mirror, see `mirror_url`.
        folder: `RUN/checkpoints`.
        keep: "last" and "every", see `CheckpointStore`: retention in the mirror.

    Attributes:
        uploaded: number of checkpoints uploaded.
        skipped: number that a newer one overtook.
        failed: number of failed attempts.
        why: reason of the last failure, until an attempt succeeds.
    """

    def __init__(self, url: str, folder: str | Path, *, keep: dict[str, Any]) -> None:
        self.uploaded = self.skipped = self.failed = 0
        self.why, self.is_refused = "", False
        self._url, self._finishes, self._has_kept = url, False, False
        old = [iteration_of(path.name) for path in find_all(folder)]
        self._task = {"url": url, "folder": os.fspath(folder), "keep": keep, "old": old}
        self._process: MirrorProcess | None = None  # started by `_listen`
        self._is_settled, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="distrain-mirror", daemon=True)
        self._thread.start()

    def finish(self, until: Callable[[], bool]) -> bool:
        """Wait until all checkpoints are uploaded; return whether they are.

        Args:
            until: called about ten times per second; true ends the wait.
        """
        self._finishes = True
        if process := self._process:
            process.go_on()
        while not self._is_settled.wait(0.1):
            if until():
                break
        return self._is_settled.is_set() and not self.why

    def close(self) -> None:
        """End the process; an upload that is cut off does not count."""
        self._is_closed.set()
        self._thread.join()
        self._kill()

    def _start(self) -> MirrorProcess:
        self._process = process = MirrorProcess(work="follow", **self._task)
        if self._finishes:
            process.go_on()
        return process

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _listen(self) -> None:
        """Log the events of the process; start it again if it died, or could not be started."""
        num_failures = 0
        while not self._is_closed.is_set():
            try:
                event = (self._process or self._start()).receive(wait_s=0.2)
            except (EOFError, ValueError, OSError) as error:
                num_failures += 1
                self._failed(str(error), num_failures)
                self._kill()
                self._is_closed.wait(min(2.0 ** (num_failures - 1), MAX_BACKOFF_S))
                continue
            if event is not None:
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "uploaded":
            self.uploaded += 1
            self.why = ""
            _log.debug("checkpoint %d is in %s", event["iteration"], self._url)
        elif kind == "skipped":
            if not self.skipped:
                _log.warning(
                    "checkpoint.mirror: uploads are slower than saves: checkpoints %s are not "
                    "uploaded, the newest is; further ones are counted",
                    event["iterations"],
                )
            self.skipped += len(event["iterations"])
        elif kind == "failed":
            self._failed(event["why"], event["number"])
        elif kind == "recovered":
            self.why = ""
            _log.info("checkpoint.mirror: works again after %d failures", event["number"])
        elif kind == "kept":
            if not self._has_kept:
                _log.warning(
                    "checkpoint.mirror: old checkpoints and parts are left there: %s; tried again "
                    "after later uploads, uploads go on",
                    event["why"],
                )
            self._has_kept = True
        elif kind == "damaged":
            _log.warning("checkpoint.mirror: not uploaded: %s", event["why"])
        elif kind == "refused":
            self.why, self.is_refused = event["why"], True
            _log.error(
                "checkpoint.mirror: %s; nothing more is uploaded, training goes on", event["why"]
            )
            self._is_settled.set()
        elif kind == "settled":
            self.why = ""
            self._is_settled.set()

    def _failed(self, why: str, number: int) -> None:
        self.failed += 1
        self.why = why
        if number % _WARN_EVERY == 1:
            _log.warning("checkpoint.mirror: %s; tried again, training goes on", why)


class Fetch:
    """Fetch the newest valid checkpoint of a mirror into a local folder; on rank 0 only.

    Call `look`, then `download` unless it must not be used, then `close`. Both are generators that
    yield at least every `POLL_S` while they wait.

    Args:
        url: of the mirror.
        folder: `RUN/checkpoints`.
        newer_than: iteration of the newest valid local checkpoint; -1 without one.

    Attributes:
        newer: iterations of newer checkpoints in the mirror, newest first; they may be damaged.
        num: number of checkpoints there, not counting half uploads.
        run_yaml: configuration of the run that wrote it; "" if it is missing.
        name: of the published checkpoint; "" if there was no newer valid one.
    """

    def __init__(self, url: str, folder: str | Path, *, newer_than: int) -> None:
        self.newer: list[int] = []
        self.num = 0
        self.run_yaml = self.name = ""
        self._process = MirrorProcess(
            work="fetch",
            url=url,
            folder=os.fspath(folder),
            newer_than=newer_than,
            run_id=read_run_id(os.fspath(folder)),
        )

    def look(self) -> Iterator[None]:
        """Wait for `newer`, `num` and `run_yaml`.

        Raises:
            MirrorUnreadable: the store cannot be read.
            MirrorRefused: it holds another run.
        """
        event = yield from self._until("found")
        self.newer, self.num, self.run_yaml = event["newer"], event["num"], event["run_yaml"]

    def download(self) -> Iterator[None]:
        """Download the newest valid checkpoint; wait for `name`.

        Raises:
            MirrorUnreadable: the store cannot be read.
            RunFailed: the local folder cannot be written.
        """
        self._process.go_on()
        event = yield from self._until("fetched")
        self.name = event["name"]

    def _until(self, kind: str) -> Any:
        """Return the next event of a kind; a generator."""
        moved = time.monotonic()
        while True:
            try:
                event = self._process.receive(wait_s=POLL_S)
            except EOFError as death:
                raise MirrorUnreadable(str(death)) from death
            if event is None:
                if time.monotonic() - moved > STALL_S:
                    raise MirrorUnreadable(f"no answer within {STALL_S:g} s")
            elif event["event"] == kind:
                return event
            else:
                moved = time.monotonic()
                self._take(event)
            yield

    def _take(self, event: dict[str, Any]) -> None:
        kind, why = event["event"], event.get("why", "")
        if kind == "passed_over":
            _log.warning("checkpoint passed over: %s", why)
        elif kind == "refused":
            raise MirrorRefused(why)
        elif kind == "unwritable":
            raise RunFailed(
                f"the download from the mirror cannot be written: {why}; no checkpoint was "
                "changed, run it again when it can be written"
            )
        elif kind == "unreadable":
            raise MirrorUnreadable(why)
        elif why:
            _log.warning("checkpoint.mirror: %s", why)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
