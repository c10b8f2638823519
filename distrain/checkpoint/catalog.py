"""Finding checkpoints in a run's folder. Standard library only: the command line starts fast."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from distrain.checkpoint import format as fmt
from distrain.checkpoint.scratch import in_use, is_scratch, remove
from distrain.files.retry import retried

ORPHAN_PATIENCE_S = 60.0

_log = logging.getLogger("distrain")


@dataclass(frozen=True)
class Found:
    """What a checkpoint's folder says of itself.

    Attributes:
        path: the folder.
        iteration: how many iterations were finished.
        valid: whether every file is what was written.
        why_not: the file and the reason if it is not valid.
        world_size: the number of ranks that wrote it; this and all below are empty if the manifest
            cannot be trusted.
        bytes: the size of its files together.
        created: when, in UTC.
        attempt: how often the run was started before.
        best: the metrics, by name, that were the best so far in it.
        run_id: the id of the run that wrote it.
        digests: a sha256 of each part, equal for equal parts.
    """

    path: Path
    iteration: int
    valid: bool
    why_not: str = ""
    world_size: int = 0
    bytes: int = 0
    created: str = ""
    attempt: int = 0
    best: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_end_left(self) -> bool:
        """Whether the end of the run, such as its final evaluation, was still to come."""
        return self.path.name.endswith(fmt.TRAINED_SUFFIX)


def find_all(folder: str | Path, *, with_trained: bool = False) -> list[Path]:
    """Return the folders of all checkpoints in a folder, oldest iteration first, unverified.

    Args:
        folder: the folder of a run's checkpoints.
        with_trained: with trained states whose run has not ended, each before the checkpoint of
            its iteration.
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
    """Verify a checkpoint and return what it says of itself.

    Args:
        path: its folder.

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
        created=manifest["created"],
        attempt=manifest["attempt"],
        best=manifest["best"],
        run_id=manifest["run_id"],
        digests=manifest["parts"],
    )


def newest_valid(folder: str | Path) -> Found | None:
    """Return the newest valid checkpoint in a folder; None if there is none.

    A damaged one is named in a warning and passed over. It may be a trained state whose run has not
    ended, see `Found.is_end_left`.

    Raises:
        OSError: one cannot be read; an older one in its place would lose what it holds.
    """
    for path in reversed(retried(lambda: find_all(folder, with_trained=True))):
        found = describe(path)
        if found.valid:
            return found
        _log.warning("checkpoint passed over: %s", found.why_not)
    return None


def clear_leftovers(folder: str | Path, *, patience_s: float = ORPHAN_PATIENCE_S) -> None:
    """Remove what killed processes were writing or deleting in a folder.

    The writer of a run that was killed may still be at work, on the newest checkpoint there is. It
    is waited for; what is in use after that is left alone.

    Args:
        folder: the folder of a run's checkpoints.
        patience_s: how long to wait at most.
    """
    deadline = time.monotonic() + patience_s
    for path in _scratch_paths(folder):
        try:
            while retried(partial(in_use, path)) and time.monotonic() < deadline:
                time.sleep(0.05)
            if not in_use(path):
                remove(path)
        except OSError as error:  # a live writer may be at work on it
            _log.warning("%s is left as it is: %s", path, error.strerror)


def _scratch_paths(folder: str | Path) -> list[str]:
    try:
        names = sorted(retried(lambda: os.listdir(folder)))
    except OSError:  # without a list nothing is removed; what must be read is found unreadable then
        return []
    return [os.path.join(folder, name) for name in names if is_scratch(name)]
