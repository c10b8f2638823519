"""Which checkpoints a run keeps; it deletes none that it did not write. Standard library only."""

from __future__ import annotations

import json
import os

from distrain import checkpoint_format as fmt
from distrain import durable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BEST_FILE = "best.json"
RUN_ID_FILE = "run_id"


def run_id_of(folder: str) -> str:
    """Return the id of the run that owns the folder; make one for a new folder."""
    try:
        with open(os.path.join(folder, RUN_ID_FILE), encoding="ascii") as file:
            run_id = file.read().strip()
        if len(run_id) == 32 and int(run_id, 16) >= 0:
            return run_id
    except (FileNotFoundError, ValueError):
        pass  # new, or damaged: then what the run wrote before is no longer known as its own
    run_id = os.urandom(16).hex()
    durable.write_small(folder, RUN_ID_FILE, run_id + "\n")
    return run_id


def _is_ours(path: str, run_id: str) -> bool:
    """Say whether this run wrote the checkpoint: its manifest is whole and has the run's id."""
    try:
        return not os.path.islink(path) and fmt.read_manifest(path)["run_id"] == run_id
    except fmt.CheckpointDamaged:
        return False


def set_aside(path: str, run_id: str, notes: list[str]) -> None:
    """Clear the name of a damaged checkpoint: delete it if this run wrote it, or rename it."""
    if not os.path.lexists(path):
        return
    if _is_ours(path, run_id):
        _delete(path)
        return
    other = f"{path}.damaged-{os.urandom(3).hex()}"
    os.rename(path, other)
    notes.append(f"{path} was damaged and not known as this run's own; it is now {other}")


def _delete(path: str) -> None:
    """Delete a checkpoint; killed on the way it leaves no half of it under its name."""
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, durable.scratch_name(name, delete=True))
    os.rename(path, scratch)
    durable.remove(scratch)


def mark_best(folder: str, best: dict[str, Any], notes: list[str]) -> None:
    """Write `best.json`, unless its checkpoint could not be saved."""
    name = fmt.folder_name(best["iteration"])
    if os.path.isdir(os.path.join(folder, name)):
        durable.write_small(folder, BEST_FILE, json.dumps(best) + "\n")
    else:
        notes.append(f"{name} is not there and was not marked as the best checkpoint")


def read_best(folder: str) -> dict[str, Any] | None:
    """Return `{"iteration": ..., "metric": ...}` of the best checkpoint, None if none is marked."""
    try:
        with open(os.path.join(folder, BEST_FILE), encoding="utf-8") as file:
            best = json.loads(file.read(1 << 16))
        return {"iteration": int(best["iteration"]), "metric": float(best["metric"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def prune(folder: str, run_id: str, newest: int, keep: dict[str, Any]) -> None:
    """Delete this run's checkpoints that are no longer kept.

    Those after `newest` neither count nor are deleted: a run that resumed before a damaged
    checkpoint will replace it, and must not take it for one of its last good ones until then.
    """
    ours = []
    for name in os.listdir(folder):
        iteration = fmt.iteration_of(name)
        path = os.path.join(folder, name)
        if iteration is not None and iteration <= newest and _is_ours(path, run_id):
            ours.append((iteration, path))
    ours.sort(reverse=True)
    best = read_best(folder)
    kept = 0
    for iteration, path in ours:
        if kept < keep["last"] and _is_whole(path):
            kept += 1
        elif (keep["every"] and iteration % keep["every"] == 0) or (
            best is not None and iteration == best["iteration"]
        ):
            continue
        else:
            _delete(path)


def _is_whole(path: str) -> bool:
    try:
        fmt.verify(path, contents=False)
    except fmt.CheckpointDamaged:
        return False
    return True
