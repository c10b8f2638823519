"""Find the newest valid checkpoint of a mirror, download and publish it; in the mirror process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fsspec.callbacks import Callback

from distrain.checkpoint import format as fmt
from distrain.checkpoint.mirror_store import Place, Stored
from distrain.checkpoint.retention import RUN_ID_FILE, read_run_id, set_aside
from distrain.checkpoint.scratch import create, lock, remove, scratch_name, write_small
from distrain.files.atomic import sync_folder

Report = Callable[[dict[str, Any]], None]


class _Progress(Callback):  # type: ignore[misc]
    """Reports the bytes of a download, at most once per `STEP` bytes."""

    STEP = 1 << 24

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report, self._reported = report, 0

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        if self.value - self._reported >= self.STEP:
            self._reported = self.value
            self._report({"event": "progress"})


def fetch(
    place: Place, there: list[Stored], folder: str, *, newer_than: int, report: Report
) -> str:
    """Publish the newest valid checkpoint of a mirror in a local folder; return its name.

    Half and damaged ones are reported and passed over.

    Args:
        place: the mirror.
        there: its checkpoints, newest first.
        folder: `RUN/checkpoints`; created if it is missing.
        newer_than: iteration of the newest valid local checkpoint; -1 without one.
        report: called with events.

    Returns:
        "" if no valid one is newer.

    Raises:
        StoreError: the store fails.
        OSError: the local folder cannot be written.
    """
    for stored in there:
        if stored.iteration <= newer_than:
            break
        why_not = stored.why_not or _fetch_one(place, stored, folder, report=report)
        if not why_not:
            return stored.name
        report({"event": "passed_over", "why": why_not})
    return ""


def _fetch_one(place: Place, stored: Stored, folder: str, *, report: Report) -> str:
    """Download one checkpoint, verify it and publish it; return why it is not valid."""
    assert stored.manifest is not None
    os.makedirs(folder, 0o755, exist_ok=True)
    scratch = os.path.join(folder, scratch_name(stored.name))
    os.mkdir(scratch, 0o755)
    try:
        with open(create(os.path.join(scratch, fmt.MANIFEST_FILE)), "wb") as manifest:
            lock(manifest.fileno())  # until the checkpoint has its name
            manifest.write(stored.raw)
            manifest.flush()
            os.fsync(manifest.fileno())
            for file in stored.manifest["files"]:
                local = os.path.join(scratch, file)
                place.get(f"{stored.name}/{file}", local, _Progress(report))
                _sync(local)
            report({"event": "progress"})
            fmt.verify(scratch)
            _publish(scratch, os.path.join(folder, stored.name), stored.manifest, report=report)
    except FileNotFoundError as error:
        if not os.path.isdir(scratch):  # not the store's
            raise
        remove(scratch)
        return f"{place.url}/{stored.name}: {error}"
    except fmt.CheckpointDamaged as error:
        remove(scratch)
        return str(error).replace(scratch, f"{place.url}/{stored.name}")
    except BaseException:
        remove(scratch)
        raise
    return ""


def _publish(scratch: str, path: str, manifest: dict[str, Any], *, report: Report) -> None:
    """Give a verified download its name; a new folder gets the run's id."""
    folder = os.path.dirname(path)
    if read_run_id(folder) is None:
        write_small(folder, RUN_ID_FILE, manifest["run_id"] + "\n")
    notes: list[str] = []
    set_aside(path, manifest["run_id"], notes)  # only a damaged one can be there
    for note in notes:
        report({"event": "note", "why": note})
    sync_folder(scratch)
    os.rename(scratch, path)
    sync_folder(folder)


def _sync(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
