"""Tables of checkpoints: all of a run, or the digests of two side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from distrain.checkpoint.catalog import Found, describe, find_all
from distrain.checkpoint.format import iteration_of
from distrain.checkpoint.retention import best_mark, known_best
from distrain.run_layout import CHECKPOINTS

DIGITS = 12  # of a digest


class NothingFound(ValueError):
    """A run has no such checkpoint; the text is one line for the user."""


def show(run: Path, *, iteration: int | None = None) -> int:
    """Print the checkpoints of a run and the digests of one; return 1 if none is valid, else 0."""
    folder = checkpoint_folder(run)
    found = [_describe(path) for path in find_all(folder, with_trained=True)]
    if not found:
        raise NothingFound(f"{run}: no checkpoints in {folder}")
    best = known_best(folder)
    print(f"{'iteration':>12} {'ranks':>6} {'size':>10}  state")
    for one in found:
        state = "valid" if one.valid else one.why_not
        left = ", the end of the run is left"
        state += left if one.is_end_left else best_mark(best, one.iteration)
        print(f"{one.iteration:>12} {one.world_size or '?':>6} {_size(one.bytes):>10}  {state}")
    if iteration is None and not any(one.valid for one in found):
        return 1
    chosen = choose(run, reversed(found), iteration=iteration)
    print(f"\ndigests of iteration {chosen.iteration}")
    for part, digest in chosen.digests.items():
        print(f"  {part:<12} {digest[:DIGITS]}")
    return 0


def compare(run: Path, other: Path, *, iteration: int | None = None) -> int:
    """Print the digests of two runs side by side; return 0 if all are equal, else 1."""
    left, right = (find_checkpoint(one, iteration=iteration) for one in (run, other))
    print_comparison(left, right, names=(str(run), str(other)))
    return 1 if differing(left, right) else 0


def print_comparison(left: Found, right: Found, *, names: tuple[str, str]) -> None:
    """Print the digests of two checkpoints side by side."""
    rows = [("iteration", str(left.iteration), str(right.iteration))]
    for part in dict.fromkeys([*left.digests, *right.digests]):
        rows.append((part, left.digests.get(part, "-"), right.digests.get(part, "-")))
    print(f"{'':<14}{names[0]:<16} {names[1]}")
    for name, a, b in rows:
        print(f"{name:<13} {a[:DIGITS]:<16} {b[:DIGITS]:<14} {'=' if a == b else '≠'}")


def differing(left: Found, right: Found) -> list[str]:
    """Return the names of the parts that differ, after "iteration" if that differs."""
    parts = dict.fromkeys([*left.digests, *right.digests])
    changed = [part for part in parts if left.digests.get(part) != right.digests.get(part)]
    return changed if left.iteration == right.iteration else ["iteration", *changed]


def find_checkpoint(run: Path, *, iteration: int | None = None) -> Found:
    """Return a checkpoint of a run, see `choose`; verify no more of them than needed."""
    newest_first = map(_describe, reversed(find_all(checkpoint_folder(run))))
    return choose(run, newest_first, iteration=iteration)


def choose(run: Path, found: Iterable[Found], *, iteration: int | None) -> Found:
    """Return the newest valid one of the checkpoints of a run, newest first, or an iteration's.

    Raises:
        NothingFound: it is missing or damaged.
    """
    for one in found:
        if iteration is None and one.valid:
            return one
        if one.iteration == iteration:
            if one.valid:
                return one
            kind = one.why_not.partition(":")[0]
            raise NothingFound(f"{run}: the checkpoint of iteration {iteration} is {kind}")
    missing = "valid checkpoint" if iteration is None else f"checkpoint of iteration {iteration}"
    raise NothingFound(f"{run}: no {missing}")


def checkpoint_folder(run: Path) -> Path:
    """Return the folder of a run's checkpoints; `run` may be that folder itself.

    Raises:
        NothingFound: the folder of the run does not exist.
    """
    if not run.is_dir():
        raise NothingFound(f"{run}: no such run folder")
    folder = run / CHECKPOINTS
    return folder if folder.is_dir() or not find_all(run) else run


def _describe(path: Path) -> Found:
    """Describe a checkpoint; `why_not` begins with "damaged: " or "unreadable: "."""
    try:
        found = describe(path)
    except OSError as error:
        why_not = f"unreadable: {error.filename or path}: {error.strerror}"
        return Found(path, iteration_of(path.name) or 0, valid=False, why_not=why_not)
    return found if found.valid else replace(found, why_not=f"damaged: {found.why_not}")


def _size(number: int) -> str:
    size = float(number)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
