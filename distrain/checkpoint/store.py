"""Checkpoints of a run: saved while training goes on, verified, kept and deleted.

`python -m distrain.checkpoint RUN` lists them, without torch, which takes a second to import: the
methods that need it import it. See `checkpoint_format` for what lies in a checkpoint's folder.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distrain.checkpoint import format as fmt
from distrain.checkpoint.catalog import Found, clear_leftovers, describe, find_all, newest_valid
from distrain.checkpoint.format import CheckpointDamaged
from distrain.checkpoint.retention import read_best
from distrain.checkpoint.scratch import remove, scratch_name
from distrain.checkpoint.writer_client import Outcome, Request, Requests
from distrain.checks import refuse_url
from distrain.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    import torch

    from distrain.checkpoint.encode import Snapshot
    from distrain.checkpoint.staging import Staging

__all__ = ["CheckpointDamaged", "CheckpointStore", "Found", "SaveFailed", "describe", "find_all"]

_log = logging.getLogger("distrain")


class SaveFailed(RunFailed):
    """A checkpoint could not be saved; older ones are untouched. Raised if `on_error="raise"`."""


class Stall(NamedTuple):
    """Seconds that training waited for one save: for the save before it, and for its own copy."""

    wait_s: float
    copy_s: float


class Best(NamedTuple):
    """The best checkpoint of a metric so far, and its value."""

    iteration: int
    metric: float


class CheckpointStore:
    """The checkpoints of one run. Rank 0 saves; any rank may find and load. Not for many threads.

    A save that fails (disk full, writer killed, ...) leaves all older checkpoints as they are.

    Args:
        folder: the folder of the run's checkpoints, `RUN/checkpoints`; made by the first save.
        background: write in a process of its own; otherwise `save` returns when it is done.
        keep_last: how many of the newest checkpoints are kept, 1 or more.
        keep_every: also keep each whose iteration is a multiple of this.
        on_error: what a save that fails does: "warn" logs one warning and training goes on,
            "raise" raises `SaveFailed` from the next `save`, `poll`, `wait` or `close`.
        attempt: how often the run was started before; only noted.

    Attributes:
        last_error: why the newest save failed; None if it did not.
        last_saved: the iteration of the newest checkpoint that this object saved, None at first.

    Raises:
        ConfigError: an argument out of its range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        background: bool = True,
        keep_last: int = 3,
        keep_every: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        attempt: int = 0,
    ) -> None:
        if keep_last < 1:
            raise ConfigError(f"keep_last={keep_last}: at least 1 checkpoint must be kept")
        if keep_every is not None and keep_every < 1:
            raise ConfigError(f"keep_every={keep_every}: give a number of iterations, or null")
        if on_error not in ("warn", "raise"):
            raise ConfigError(f"on_error={on_error!r}: give 'warn' or 'raise'")
        refuse_url("folder", folder)
        self.folder = Path(os.path.abspath(folder))
        self.last_error: str | None = None
        self.last_saved: int | None = None
        # a folder that is gone later must not be made again, nor another one in its place be used
        around = self.folder.parent
        self._parent = around.stat().st_ino if around.is_dir() else None
        self._background = background
        self._keep = {"last": keep_last, "every": keep_every}
        self._on_error = on_error
        self._attempt = attempt
        self._staging: Staging | None = None
        self._requests: Requests | None = None
        self._newest = -1  # the iteration of the newest save, unless it failed
        self._to_raise: SaveFailed | None = None

    def check(self, state: Mapping[str, Any]) -> Snapshot:
        """Take a state apart as a save does, without copying a tensor.

        Raises:
            ConfigError: it holds something that cannot be saved; the text has its place and type.
        """
        from distrain.checkpoint.encode import encode

        try:
            return encode(state)
        except TypeError as error:
            raise ConfigError(str(error)) from error

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Let the writer start and get memory for such a state, so that the first save is fast too.

        Best called after the first iteration, when the optimizer has its state. Returns at once;
        ConfigError if the state holds something that cannot be saved.
        """
        from distrain.checkpoint.staging import place, size_with_headroom

        size = place(self.check(state).tensors)[1]
        try:
            self._send(Request("reserve", {"reserve": size_with_headroom(size)}))
        except OSError as error:
            _log.warning("the checkpoint writer could not be started: %s", error)

    def save(
        self,
        iteration: int,
        state: Mapping[str, Any],
        *,
        world_size: int,
        best: Mapping[str, float] | None = None,
        is_end_left: bool = False,
    ) -> Stall:
        """Save the state after `iteration` finished iterations; only its copy is waited for.

        Returns how long that took. A valid checkpoint of that iteration is left as it is.

        Args:
            iteration: how many iterations are finished.
            state: parts by name: model, optimizer, ...; see `snapshot.ALLOWED` for what they may
                hold. It may change as soon as this returns.
            world_size: the number of ranks; noted in the manifest.
            best: the metrics, by name, that are better than ever before. The checkpoint and that it
                is their best one are published together, and it is kept until a better one is.
            is_end_left: the iterations are done, but not what comes after the last one: a run that
                starts from here is not finished. The next save that is takes its place.

        Raises:
            ValueError: a metric is not finite.
            TypeError: the state holds something that cannot be saved.
            SaveFailed: this save or the one before it failed, see `on_error`.
        """
        from distrain.checkpoint.encode import encode

        start = time.perf_counter()
        best = {name: float(value) for name, value in (best or {}).items()}
        for name, value in best.items():
            if not math.isfinite(value):
                raise ValueError(f"{name}={value}: the best checkpoint needs a finite metric")
        if iteration == self._newest and not best and not is_end_left:
            return Stall(0.0, 0.0)
        self.wait()
        waited = time.perf_counter()
        snapshot = encode(state)
        name = fmt.folder_name(iteration) + (fmt.TRAINED_SUFFIX if is_end_left else "")
        scratch = scratch_name(name)
        job = {
            "folder": str(self.folder),
            "parent": self._parent,
            "iteration": iteration,
            "name": name,
            "scratch": scratch,
            "keep": self._keep,
            "manifest": {
                "world_size": world_size,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "attempt": self._attempt,
                "best": best,
            },
        }
        self._newest = self._newest if is_end_left else iteration
        try:
            place = self._staged().fill(snapshot, job)
            kind: Literal["trained", "save"] = "trained" if is_end_left else "save"
            self._send(Request(kind, {"save": place}, iteration, scratch))
        except OSError as error:
            self._save_failed(iteration, f"{type(error).__name__}: {error}")
        self._settle(wait=not self._background)
        return Stall(waited - start, time.perf_counter() - waited)

    def best(self) -> dict[str, Best]:
        """Return which checkpoint is the best by the name of the metric; OSError if unreadable."""
        return {name: Best(**best) for name, best in read_best(str(self.folder)).items()}

    def poll(self) -> bool:
        """Take note of what the writer has done, without waiting; True if it has done all."""
        return self._settle(wait=False)

    def wait(self) -> bool:
        """Wait until the newest save is on the disk; True if it is, False if it failed."""
        self._settle(wait=True)
        return self.last_error is None

    def close(self) -> None:
        """Wait until the newest save is on the disk, end the writer and give back its memory."""
        try:
            self.wait()
        finally:
            if self._requests is not None:
                self._requests.close()
                self._requests = None
            if self._staging is not None:
                self._staging.close()
                self._staging = None

    def newest_valid(self) -> Found | None:
        """Return the newest checkpoint that is what was written; None if there is none.

        A damaged one is named in a warning and passed over. What dead processes left behind is
        removed. The writer of a run that was killed may still be at work, on the newest one: it is
        waited for, up to a minute.

        Raises:
            OSError: one cannot be read, after retries.
        """
        self.wait()
        clear_leftovers(self.folder)
        return newest_valid(self.folder)

    def load(
        self, which: int | str | Path, *, map_location: str | torch.device = "cpu"
    ) -> dict[str, Any]:
        """Return the state of a checkpoint, as it was saved.

        Args:
            which: its iteration, or the path of any checkpoint's folder.
            map_location: the device of all torch tensors.

        Raises:
            CheckpointDamaged: a file is not what was written.
            OSError: a file cannot be read, after retries.
        """
        from distrain.checkpoint.decode import load_checkpoint

        path = self._path(which) if isinstance(which, int) else Path(which)
        return load_checkpoint(path, map_location=map_location)

    def _path(self, iteration: int) -> Path:
        return self.folder / fmt.folder_name(iteration)

    def _staged(self) -> Staging:
        from distrain.checkpoint.staging import Staging

        if self._staging is None:
            self._staging = Staging()
        return self._staging

    def _send(self, request: Request) -> None:
        if self._requests is None:
            self._requests = Requests(self._staged().fd, background=self._background)
        self._requests.send(request)

    def _settle(self, *, wait: bool) -> bool:
        """Take note of what became of the requests; True if none is left."""
        if self._requests is not None:
            for outcome in self._requests.settle(wait=wait):
                self._take(outcome)
        if self._to_raise is not None:
            failure, self._to_raise = self._to_raise, None
            raise failure
        return self._requests is None or self._requests.idle()

    def _take(self, outcome: Outcome) -> None:
        kind, _, iteration, scratch = outcome.request
        for note in outcome.notes:
            _log.warning("checkpoints: %s", note)
        if kind != "reserve" and outcome.error is None:
            self.last_error = None
            if kind == "save":
                self.last_saved = iteration
            _log.debug("checkpoint %d was written in %.2f s", iteration, outcome.write_s)
        elif kind != "reserve":
            remove(str(self.folder / scratch))  # a writer that was killed leaves it,
            clear_leftovers(self.folder, patience_s=0.0)  # or what it was deleting
            self._save_failed(iteration, outcome.error)
        # memory that could not be reserved is reported by the save that needs it

    def _save_failed(self, iteration: int, why: str | None) -> None:
        self._newest, self.last_error = -1, why
        text = f"checkpoint {iteration} in {self.folder} was not saved: {why}"
        if self._on_error == "raise":
            self._to_raise = SaveFailed(text)
        else:
            _log.warning("%s; training goes on, older checkpoints are untouched", text)
