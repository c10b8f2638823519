"""Find and verify the checkpoints of a run. Standard library only: commands start fast."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from distrain.checkpoint import format as fmt
from distrain.checkpoint.retention import read_run_id
from distrain.checkpoint.scratch import in_use, is_scratch, remove
from distrain.files.retry import retried

ORPHAN_PATIENCE_S = 60.0  # longest wait for the writer of a killed run

_log = logging.getLogger("distrain")


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        iteration: number of finished iterations.
        valid: whether no file differs from what was written.
        why_not: file and reason if it is not valid.
        world_size: number of ranks that wrote it; with a damaged manifest, this and all below are
            empty.
        bytes: total size of its files.
        run_id: id of the run that wrote it.
        digests: sha256 of each part, equal for equal parts.
    """

    path: Path
    iteration: int
    valid: bool
    why_not: str = ""
    world_size: int = 0
    bytes: int = 0
    run_id: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_end_left(self) -> bool:
        """Whether the end of the run (final evaluation, ...) was still to be done."""
        return self.path.name.endswith(fmt.TRAINED_SUFFIX)


def find_all(folder: str | Path, *, with_trained: bool = False) -> list[Path]:
    """Return the paths of all checkpoints in a folder, oldest iteration first, unverified.

    With `with_trained`, trained states are included, each before the checkpoint of its iteration.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbered = [(fmt.iteration_of(name), 1, name) for name in names]
    if with_trained:
        numbered += [(fmt.trained_iteration_of(name), 0, name) for name in names]
    return [
        Path(folder, name) for number, _, name in sorted(n for n in numbered if n[0] is not None)
    ]


def describe(path: str | Path) -> Found:
    """Verify the checkpoint in folder `path` and return its description.

    Raises:
        OSError: it cannot be read, after retries: it may be valid or not.
    """
    path = Path(path)
    try:
        manifest = fmt.verify(os.fspath(path))
        why_not = ""
    except fmt.CheckpointDamaged as error:
        why_not = str(error)
        try:
            manifest = fmt.read_manifest(os.fspath(path))
        except fmt.CheckpointDamaged:
            return Found(path, fmt.iteration_of(path.name) or 0, valid=False, why_not=why_not)
    return Found(
        path=path,
        iteration=manifest["iteration"],
        valid=not why_not,
        why_not=why_not,
        world_size=manifest["world_size"],
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        run_id=manifest["run_id"],
        digests=manifest["parts"],
    )


def of_another_run(path: Path, written_by: str, run_id: str | None) -> str:
    """Return why a checkpoint is passed over if another run wrote it; "" if not, or not known.

    Args:
        path: of the checkpoint.
        written_by: the run id in its manifest.
        run_id: that of its folder.
    """
    if run_id is None or written_by == run_id:
        return ""
    return f"{path} was written by another run: its run_id is not that of {path.parent}/run_id"


def newest_valid(folder: str | Path) -> Found | None:
    """Return the newest valid checkpoint or trained state in a folder, None without one.

    Damaged ones, and those of another run than the folder's, are skipped with a warning.

    Raises:
        OSError: one cannot be read; resuming from an older one would lose its iterations.
    """
    paths = retried(lambda: find_all(folder, with_trained=True))
    run_id = read_run_id(os.fspath(folder)) if paths else None
    for path in reversed(paths):
        found = describe(path)
        why = found.why_not or of_another_run(path, found.run_id, run_id)
        if not why:
            return found
        _log.warning("checkpoint passed over: %s", why)
    return None


def clear_leftovers(folder: str | Path, *, patience_s: float = ORPHAN_PATIENCE_S) -> None:
    """Remove the scratch files of dead processes from a folder.

    The writer of a killed run may still be writing its newest checkpoint: it is waited for, at most
    `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    try:
        names = sorted(retried(lambda: os.listdir(folder)))
    except OSError:  # a caller that must read the folder gets the error itself
        return
    for path in [os.path.join(folder, name) for name in names if is_scratch(name)]:
        try:
            while retried(partial(in_use, path)) and time.monotonic() < deadline:
                time.sleep(0.05)
            if not in_use(path):
                remove(path)
        except OSError as error:  # a live writer may use it
            _log.warning("%s is left as it is: %s", path, error.strerror)
