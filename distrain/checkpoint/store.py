"""CheckpointStore: save in the background, verify, load and delete the checkpoints of a run.

Methods that need torch import it: it takes a second. Files of a checkpoint: see `format`.
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
from distrain.checkpoint.retention import list_own, read_run_id
from distrain.checkpoint.scratch import remove, scratch_name
from distrain.checkpoint.writer_client import Outcome, Request, Requests
from distrain.checks import one_of, refuse_url, whole
from distrain.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    import torch

    from distrain.checkpoint.encode import Snapshot
    from distrain.checkpoint.staging import Staging

__all__ = ["CheckpointDamaged", "CheckpointStore", "Found", "SaveFailed", "describe", "find_all"]

_log = logging.getLogger("distrain")


class SaveFailed(RunFailed):
    """A save failed with `on_error="raise"`; older checkpoints are untouched."""


class Score(NamedTuple):
    """Value of a metric, and how many checkpoints with the best values are kept."""

    value: float
    larger_is_better: bool
    keep: int


def _check_finite(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}: the best checkpoint needs a finite metric")


class CheckpointStore:
    """Checkpoints of one run. Rank 0 saves, any rank may load. Not thread-safe.

    A save that fails (disk full, writer killed, ...) leaves all older checkpoints as they are.

    Args:
        folder: `RUN/checkpoints`; created by the first save.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_every: also keep each whose iteration is a multiple of this.
        on_error: after a failed save, "warn" logs a warning and training goes on; "raise" raises
            `SaveFailed` from the next `save`, `poll`, `wait` or `close`.
        attempt: number of earlier starts of the run, for the manifest.

    Attributes:
        last_error: reason of the newest save's failure; None if it succeeded.
        last_saved: iteration of the newest checkpoint saved by this object; None without one.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        attempt: int = 0,
    ) -> None:
        whole("keep_last", keep_last, least=1)
        if keep_every is not None:
            whole("keep_every", keep_every, least=1)
        one_of("on_error", on_error, ("warn", "raise"))
        refuse_url("folder", folder)
        self.folder = Path(os.path.abspath(folder))
        self.last_error: str | None = None
        self.last_saved: int | None = None
        # a run folder deleted or replaced while training must not be written to
        around = self.folder.parent
        self._parent = around.stat().st_ino if around.is_dir() else None
        self._keep = {"last": keep_last, "every": keep_every}
        self._on_error = on_error
        self._attempt = attempt
        self._staging: Staging | None = None
        self._requests: Requests | None = None
        self._newest = -1  # iteration of the newest save, unless it failed
        self._to_raise: SaveFailed | None = None

    def newest_own(self) -> int | None:
        """Return the iteration of the newest checkpoint that this folder's run wrote, unverified.

        None without one, and where it cannot be read: a save reports that.
        """
        folder = str(self.folder)
        try:
            run_id = read_run_id(folder)
            own = [] if run_id is None else list_own(folder, run_id)
        except OSError:
            return None
        return own[0][0] if own else None

    def check(self, state: Mapping[str, Any]) -> Snapshot:
        """Encode a state as a save does, without a copy.

        Raises:
            ConfigError: a value cannot be saved; the text has its dotted path and type.
        """
        from distrain.checkpoint.encode import encode

        try:
            return encode(state)
        except TypeError as error:
            raise ConfigError(str(error)) from error

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Start the writer and allocate memory in the background: the first save is fast, too.

        Best called after the first iteration, when the optimizer has its state.

        Raises:
            ConfigError: a value cannot be saved.
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
        scores: Mapping[str, Score] | None = None,
        is_end_left: bool = False,
    ) -> None:
        """Copy the state after `iteration` iterations, and write it in the background.

        A valid checkpoint of that iteration is left as it is; one of another run is renamed.

        Args:
            iteration: number of finished iterations.
            state: parts by name: model, optimizer, ...; allowed values: `encode.ALLOWED`. It may
                change as soon as this returns.
            world_size: number of ranks, for the manifest.
            best: metrics by name that were never better. They are published with the checkpoint,
                which is kept until a better one is.
            scores: metrics by name of which the best few checkpoints are kept.
            is_end_left: all iterations are done, the end of the run (final evaluation, ...) is not:
                a run that resumes here still has to do it. Replaced by the next complete save.

        Raises:
            ValueError: a metric is not finite.
            TypeError: a value of the state cannot be saved.
            SaveFailed: this save or the one before it failed, see `on_error`.
        """
        from distrain.checkpoint.encode import encode

        best = {name: float(value) for name, value in (best or {}).items()}
        scores = scores or {}
        _check_finite({**{n: score.value for n, score in scores.items()}, **best})
        if iteration == self._newest and not (best or scores or is_end_left):
            return
        self.wait()
        snapshot = encode(state)
        name = fmt.folder_name(iteration) + (fmt.TRAINED_SUFFIX if is_end_left else "")
        scratch = scratch_name(name)
        manifest = {
            "world_size": world_size,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "attempt": self._attempt,
            "best": best,
            **({"scores": {n: score._asdict() for n, score in scores.items()}} if scores else {}),
        }
        job = self._job(iteration, name=name, scratch=scratch, manifest=manifest)
        self._newest = self._newest if is_end_left else iteration
        try:
            place = self._staged().fill(snapshot, job)
            kind: Literal["trained", "save"] = "trained" if is_end_left else "save"
            self._send(Request(kind, {"save": place}, iteration, scratch))
        except OSError as error:
            self._save_failed(iteration, f"{type(error).__name__}: {error}")
        self._settle(wait=False)

    def _job(self, iteration: int, **fields: Any) -> dict[str, Any]:
        """Return the request of a save to the writer process, but its tensors."""
        own = {"folder": str(self.folder), "parent": self._parent, "keep": self._keep}
        return {"iteration": iteration, **own, **fields}

    def poll(self) -> bool:
        """Collect outcomes of saves without waiting; return whether all have one."""
        return self._settle(wait=False)

    def wait(self) -> bool:
        """Wait until the newest save is on the disk; return whether it succeeded."""
        self._settle(wait=True)
        return self.last_error is None

    def close(self) -> None:
        """Wait until the newest save is on the disk; end the writer and free its memory."""
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
        """Return the newest valid checkpoint, None without one; see `catalog.newest_valid`.

        Leftovers of dead processes are removed first; the writer of a killed run, which may still
        write the newest checkpoint, is waited for, up to a minute.
        """
        self.wait()
        clear_leftovers(self.folder)
        return newest_valid(self.folder)

    def load(
        self, which: int | str | Path, *, map_location: str | torch.device = "cpu"
    ) -> dict[str, Any]:
        """Return the state of an iteration or of a checkpoint folder; see `load_checkpoint`."""
        from distrain.checkpoint.decode import load_checkpoint

        path = self.folder / fmt.folder_name(which) if isinstance(which, int) else Path(which)
        return load_checkpoint(path, map_location=map_location)

    def _staged(self) -> Staging:
        from distrain.checkpoint.staging import Staging

        if self._staging is None:
            self._staging = Staging()
        return self._staging

    def _send(self, request: Request) -> None:
        if self._requests is None:
            self._requests = Requests(self._staged().fd)
        self._requests.send(request)

    def _settle(self, *, wait: bool) -> bool:
        """Collect outcomes of requests; return whether all have one."""
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
            remove(str(self.folder / scratch))  # left by a killed writer
            clear_leftovers(self.folder, patience_s=0.0)
            self._save_failed(iteration, outcome.error)
        # a failed reservation is reported by the save that needs the memory

    def _save_failed(self, iteration: int, why: str | None) -> None:
        self._newest, self.last_error = -1, why
        text = f"checkpoint {iteration} in {self.folder} was not saved: {why}"
        if self._on_error == "raise":
            self._to_raise = SaveFailed(text)
        else:
            _log.warning("%s; training goes on, older checkpoints are untouched", text)
