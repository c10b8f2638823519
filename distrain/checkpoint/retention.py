"""Which checkpoints a run keeps; it deletes none that it did not write. Standard library only."""

from __future__ import annotations

import json
import os

from distrain.checkpoint import format as fmt
from distrain.checkpoint.scratch import remove, scratch_name, write_small
from distrain.files.regular import read_regular
from distrain.files.retry import read_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

BEST_FILE = "best.json"
RUN_ID_FILE = "run_id"


def run_id_of(folder: str) -> str:
    """Return the id of the run that owns the folder; make one for a new folder."""
    run_id = read_run_id(folder)
    if run_id is None:  # what the run wrote before is no longer known as its own
        run_id = os.urandom(16).hex()
        write_small(folder, RUN_ID_FILE, run_id + "\n")
    return run_id


def read_run_id(folder: str) -> str | None:
    """Return the id of the run that owns the folder; None if there is none, or a damaged one.

    Raises:
        OSError: it cannot be read, after retries.
    """
    try:
        run_id = read_file(os.path.join(folder, RUN_ID_FILE), 64).decode("ascii").strip()
        return run_id if len(run_id) == 32 and int(run_id, 16) >= 0 else None
    except (FileNotFoundError, ValueError):
        return None


def _is_ours(path: str, run_id: str) -> bool:
    """Whether this run wrote the checkpoint: its manifest is whole and has the run's id.

    Raises:
        OSError: the manifest cannot be read; the checkpoint is to be left alone then.
    """
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


def step_aside(path: str) -> None:
    """Take the name from a valid checkpoint that a newer one of its iteration is to replace.

    Until that one has the name, it is found as a trained state would be; then `prune` deletes it.
    """
    aside = path + fmt.TRAINED_SUFFIX
    if os.path.lexists(aside):
        _delete(aside)
    os.rename(path, aside)


def _delete(path: str) -> None:
    """Delete a checkpoint; killed on the way it leaves no half of it under its name."""
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, scratch_name(name, delete=True))
    os.rename(path, scratch)
    remove(scratch)


def read_best(folder: str) -> dict[str, dict[str, Any]]:
    """Return `{"iteration": ..., "metric": ...}` of the best checkpoint by the metric's name.

    The manifests decide: a metric's best checkpoint is the newest one marked as such. `best.json`
    repeats it for people and tools.

    Raises:
        OSError: a manifest or the run's id cannot be read, after retries.
    """
    run_id = read_run_id(folder)
    return {} if run_id is None else _best_of(_own(folder, run_id))


def _own(folder: str, run_id: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Return iteration, path and manifest of each checkpoint that the run wrote, newest first.

    Raises:
        OSError: one cannot be read, so that nothing is known of it; nothing may be deleted then.
    """
    own = []
    for name in os.listdir(folder):
        iteration = fmt.iteration_of(name)
        path = os.path.join(folder, name)
        if iteration is None or os.path.islink(path):
            continue
        try:
            manifest = fmt.read_manifest(path)
        except fmt.CheckpointDamaged:
            continue
        if manifest["run_id"] == run_id:
            own.append((iteration, path, manifest))
    return sorted(own, key=lambda each: each[0], reverse=True)


def _best_of(own: list[tuple[int, str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for iteration, _, manifest in own:
        for name, metric in manifest["best"].items():
            best.setdefault(name, {"iteration": iteration, "metric": metric})
    return dict(sorted(best.items()))


def _write_best(folder: str, best: dict[str, dict[str, Any]]) -> None:
    """Bring `best.json` up to date: `{"metrics": {name: {"iteration", "metric"}}}`.

    Of a single metric, "iteration" and "metric" are there at the top as well.
    """
    if not best:
        return
    fields = {**next(iter(best.values())), "metrics": best} if len(best) == 1 else {"metrics": best}
    text = json.dumps(fields) + "\n"
    try:
        old = read_regular(os.path.join(folder, BEST_FILE), max_bytes=len(text))
        if old == text.encode():
            return
    except OSError:
        pass  # it is written, whatever is in its place
    write_small(folder, BEST_FILE, text)


def prune(folder: str, run_id: str, newest: int, keep: dict[str, Any], notes: list[str]) -> None:
    """Note which checkpoints are the best, then delete those that are no longer kept.

    Those after `newest` neither count nor are deleted: a run that resumed before a damaged
    checkpoint will replace it, and must not take it for one of its last good ones until then.
    """
    own = [each for each in _own(folder, run_id) if each[0] <= newest]
    best = _best_of(own)
    try:
        _write_best(folder, best)
    except OSError as error:
        notes.append(f"{BEST_FILE} could not be written: {error}")
    kept = 0
    for iteration, path, _ in own:
        if kept < keep["last"] and _is_whole(path):
            kept += 1
        elif (keep["every"] and iteration % keep["every"] == 0) or any(
            iteration == one["iteration"] for one in best.values()
        ):
            continue
        else:
            _delete(path)
    for name in os.listdir(folder):  # trained states that a checkpoint has taken the place of
        trained = fmt.trained_iteration_of(name)
        if trained is not None and trained <= newest:
            path = os.path.join(folder, name)
            if _is_ours(path, run_id):
                _delete(path)


def _is_whole(path: str) -> bool:
    try:
        fmt.verify(path, contents=False)
    except fmt.CheckpointDamaged:
        return False
    return True


def known_best(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the best checkpoint by the name of the metric; none where one cannot be read."""
    try:
        return read_best(str(folder))
    except OSError:
        return {}


def best_mark(best: Mapping[str, Mapping[str, Any]], iteration: int) -> str:
    """Return " (best)" for the best checkpoint; of several metrics, with their names.

    Args:
        best: see `read_best`.
        iteration: of the checkpoint.
    """
    names = [name for name, one in best.items() if one["iteration"] == iteration]
    if not names:
        return ""
    return " (best)" if len(best) == 1 else f" (best {', '.join(names)})"
