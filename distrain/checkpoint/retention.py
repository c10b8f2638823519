"""Retention: keep the last, every n-th and the best checkpoints. Standard library only.

A run deletes only checkpoints that it wrote itself: their manifests have its run id.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from distrain.checkpoint import format as fmt
from distrain.checkpoint.scratch import remove, scratch_name, write_small
from distrain.files.open_regular import read_regular
from distrain.files.retry import read_file

BEST_FILE = "best.json"
RUN_ID_FILE = "run_id"


def run_id_of(folder: str) -> str:
    """Return the id of the run that owns the folder; create it in a new folder."""
    run_id = read_run_id(folder)
    if run_id is None:  # after damage, earlier checkpoints count as foreign
        run_id = os.urandom(16).hex()
        write_small(folder, RUN_ID_FILE, run_id + "\n")
    return run_id


def read_run_id(folder: str) -> str | None:
    """Return the id of the run that owns the folder; None if it is missing or damaged.

    Raises:
        OSError: it cannot be read, after retries.
    """
    try:
        run_id = read_file(os.path.join(folder, RUN_ID_FILE), 64).decode("ascii").strip()
        return run_id if len(run_id) == 32 and int(run_id, 16) >= 0 else None
    except (FileNotFoundError, ValueError):
        return None


def _is_ours(path: str, run_id: str) -> bool:
    """Return whether this run wrote the checkpoint: a valid manifest has its id.

    Raises:
        OSError: the manifest cannot be read: leave the checkpoint alone.
    """
    try:
        return not os.path.islink(path) and fmt.read_manifest(path)["run_id"] == run_id
    except fmt.CheckpointDamaged:
        return False


def set_aside(path: str, run_id: str, notes: list[str]) -> None:
    """Free the name of a checkpoint that is damaged, or valid and of another run.

    It is deleted if this run wrote it, else renamed.
    """
    if not os.path.lexists(path):
        return
    if _is_ours(path, run_id):
        _delete(path)
        return
    other = f"{path}.damaged-{os.urandom(3).hex()}"
    why = "damaged and not written by this run"
    with contextlib.suppress(fmt.CheckpointDamaged):
        fmt.verify(path)
        other = f"{path}.other-{os.urandom(3).hex()}"
        why = "written by another run"
    os.rename(path, other)
    notes.append(f"{path} was {why}; renamed to {other}")


def step_aside(path: str) -> None:
    """Free the name of a valid checkpoint for a newer one of the same iteration.

    Renamed to a trained state, it can still be resumed from until `prune` deletes it.
    """
    aside = path + fmt.TRAINED_SUFFIX
    if os.path.lexists(aside):
        _delete(aside)
    os.rename(path, aside)


def _delete(path: str) -> None:
    """Delete a checkpoint; a kill leaves no part of it under its name."""
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, scratch_name(name, delete=True))
    os.rename(path, scratch)
    remove(scratch)


def read_best(folder: str) -> dict[str, dict[str, Any]]:
    """Return the best checkpoint by each metric's name, from the manifests.

    `best.json` is a copy for users and tools. In each, "iteration" and "metric" are those of the
    newest checkpoint that is marked as best. "top", of a metric of which several are kept, lists
    them, best first.

    Raises:
        OSError: a manifest or the run's id cannot be read, after retries.
    """
    run_id = read_run_id(folder)
    return {} if run_id is None else _best_of(list_own(folder, run_id))


def list_own(folder: str, run_id: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Return iteration, path and manifest of each checkpoint that the run wrote, newest first.

    Raises:
        OSError: a manifest cannot be read: delete nothing.
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
    for name, top in _top_of(own).items():
        if name in best:
            best[name]["top"] = top
    return dict(sorted(best.items()))


def _top_of(own: list[tuple[int, str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the checkpoints with the best values of each metric with scores, best first.

    Of equal values the earlier is better. How many there are is said by the newest manifest.
    """
    found: dict[str, list[tuple[float, int, dict[str, Any]]]] = {}
    for iteration, _, manifest in own:
        for name, score in manifest.get("scores", {}).items():
            rank = -score["value"] if score["larger_is_better"] else score["value"]
            found.setdefault(name, []).append((rank, iteration, score))
    return {
        name: [
            {"iteration": iteration, "metric": score["value"]}
            for _, iteration, score in sorted(each, key=lambda one: one[:2])[: each[0][2]["keep"]]
        ]
        for name, each in found.items()
    }


def _write_best(folder: str, best: dict[str, dict[str, Any]]) -> None:
    """Update `best.json`: `{"metrics": ...}` as `read_best` returns it.

    With a single metric, its fields are on the top level as well.
    """
    if not best:
        return
    fields = {**next(iter(best.values())), "metrics": best} if len(best) == 1 else {"metrics": best}
    text = json.dumps(fields) + "\n"
    with contextlib.suppress(OSError):
        if read_regular(os.path.join(folder, BEST_FILE), max_bytes=len(text)) == text.encode():
            return
    write_small(folder, BEST_FILE, text)


def prune(folder: str, run_id: str, newest: int, keep: dict[str, Any], notes: list[str]) -> None:
    """Update `best.json`, then delete the checkpoints that are no longer kept.

    Those after `newest` neither count nor are deleted: a run that resumed before a damaged
    checkpoint will replace it, and must not count it as one of the last valid ones until then.
    """
    own = [each for each in list_own(folder, run_id) if each[0] <= newest]
    try:
        _write_best(folder, _best_of(own))
    except OSError as error:
        notes.append(f"{BEST_FILE} could not be written: {error}")
    lasting = lasting_of(own, keep["every"])
    kept = 0
    for iteration, path, _ in own:
        if kept < keep["last"] and _has_right_sizes(path):
            kept += 1
        elif iteration not in lasting:
            _delete(path)
    for name in os.listdir(folder):  # trained states, replaced by a checkpoint
        trained = fmt.trained_iteration_of(name)
        if trained is not None and trained <= newest:
            path = os.path.join(folder, name)
            if _is_ours(path, run_id):
                _delete(path)


def lasting_of(own: list[tuple[int, str, dict[str, Any]]], every: int | None) -> set[int]:
    """Return the iterations that are kept for another reason than being among the last.

    Args:
        own: iteration, path and manifest of each checkpoint of the run, newest first.
        every: multiples of this are kept; None: no others than the best.
    """
    lasting = {one["iteration"] for one in _best_of(own).values()}
    lasting |= {one["iteration"] for ones in _top_of(own).values() for one in ones}
    return lasting | {iteration for iteration, *_ in own if every and iteration % every == 0}


def _has_right_sizes(path: str) -> bool:
    try:
        fmt.verify(path, contents=False)
    except fmt.CheckpointDamaged:
        return False
    return True


def known_best(folder: str | os.PathLike[str]) -> Mapping[str, Mapping[str, Any]]:
    """Return the result of `read_best`; empty if a file cannot be read."""
    try:
        return read_best(os.fspath(folder))
    except OSError:
        return {}


def best_mark(best: Mapping[str, Mapping[str, Any]], iteration: int) -> str:
    """Return " (best)" if the checkpoint is in `known_best`, with the names of several metrics.

    Of a metric of which several checkpoints are kept, with its place: " (best 2 of 3)".
    """
    marks = []
    for name, one in best.items():
        top = [each["iteration"] for each in one.get("top", ())]
        words = ["best"] if len(best) == 1 else ["best", name]
        if iteration in top and len(top) > 1:
            marks.append(" ".join([*words, f"{top.index(iteration) + 1} of {len(top)}"]))
        elif one["iteration"] == iteration:
            marks.append(" ".join(words))
    return f" ({', '.join(marks)})" if marks else ""
