"""The checkpoints of one run as a table, or the digests of two runs side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distrain.checkpoint.catalog import Found, describe, find_all
from distrain.checkpoint.format import iteration_of
from distrain.checkpoint.retention import read_best

DIGITS = 12  # of a digest: enough to tell parts apart
VERIFY = "--verify-resume"


class NothingFound(ValueError):
    """A run has no checkpoint of the kind asked for; the text is one line for the user."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.checkpoint",
        description="List and verify the checkpoints of a run, or compare those of two runs; with "
        "--verify-resume, see whether an experiment resumes bit for bit.",
        epilog="Exit status: 0 valid (and equal), 1 damaged or different, 2 nothing to look at.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/first")
    parser.add_argument(
        "other", type=Path, metavar="RUN2", nargs="?", help="another run, to compare with"
    )
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="show or compare the digests of this iteration (default: the newest valid one)",
    )
    parser.add_argument(
        VERIFY,
        action="store_true",
        help="instead of RUN, take the arguments of `python -m distrain`, train straight and "
        f"interrupted, and compare; `{VERIFY} --help` says more",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the command line asks for and return the exit status.

    Args:
        arguments: the command line, `sys.argv` if it is None.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the sign for "unequal"
    try:
        if VERIFY in arguments:
            from distrain.cli import verify_resume as verify

            return verify.main([each for each in arguments if each != VERIFY])
        options = build_parser().parse_args(arguments)
        if options.other is None:
            return show(options.run, iteration=options.iteration)
        return compare(options.run, options.other, iteration=options.iteration)
    except (NothingFound, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def show(run: Path, *, iteration: int | None = None) -> int:
    """Print all checkpoints of a run, and the digests of one; 1 if none is valid, else 0."""
    folder = checkpoint_folder(run)
    found = [_describe(path) for path in find_all(folder, with_trained=True)]
    if not found:
        raise NothingFound(f"{run}: no checkpoints in {folder}")
    best = known_best(folder)
    print(f"{'iteration':>12} {'ranks':>6} {'size':>10}  state")
    for one in found:
        state = "valid" if one.valid else one.why_not
        state += (
            ", the end of the run is left" if one.is_end_left else best_mark(best, one.iteration)
        )
        print(f"{one.iteration:>12} {one.world_size or '?':>6} {_size(one.bytes):>10}  {state}")
    if iteration is None and not any(one.valid for one in found):
        return 1
    chosen = choose(run, reversed(found), iteration=iteration)
    print(f"\ndigests of iteration {chosen.iteration}")
    for part, digest in chosen.digests.items():
        print(f"  {part:<12} {digest[:DIGITS]}")
    return 0


def compare(run: Path, other: Path, *, iteration: int | None = None) -> int:
    """Print the digests of two runs' checkpoints side by side; 0 if all are equal, else 1."""
    left, right = (the_checkpoint(one, iteration=iteration) for one in (run, other))
    print_comparison(left, right, names=(str(run), str(other)))
    return 1 if differing(left, right) else 0


def print_comparison(left: Found, right: Found, *, names: tuple[str, str]) -> None:
    """Print the digests of two checkpoints side by side, under the names of their runs."""
    rows = [("iteration", str(left.iteration), str(right.iteration))]
    for part in dict.fromkeys([*left.digests, *right.digests]):
        rows.append((part, left.digests.get(part, "-"), right.digests.get(part, "-")))
    print(f"{'':<14}{names[0]:<16} {names[1]}")
    for name, a, b in rows:
        print(f"{name:<13} {a[:DIGITS]:<16} {b[:DIGITS]:<14} {'=' if a == b else '≠'}")


def differing(left: Found, right: Found) -> list[str]:
    """Return the names of what differs between two checkpoints: parts, or their iteration."""
    parts = dict.fromkeys([*left.digests, *right.digests])
    changed = [part for part in parts if left.digests.get(part) != right.digests.get(part)]
    return changed if left.iteration == right.iteration else ["iteration", *changed]


def the_checkpoint(run: Path, *, iteration: int | None = None) -> Found:
    """Return the newest valid checkpoint of a run, or the one of an iteration; see `choose`."""
    return choose(run, _newest_first(run), iteration=iteration)


def choose(run: Path, found: Iterable[Found], *, iteration: int | None) -> Found:
    """Return the newest valid checkpoint, or the one of an iteration.

    Args:
        run: the run's folder.
        found: its checkpoints, newest first.
        iteration: the iteration; None for the newest valid one.

    Raises:
        NothingFound: there is none, or it is damaged.
    """
    for one in found:
        if iteration is None and one.valid:
            return one
        if one.iteration == iteration:
            if one.valid:
                return one
            kind = one.why_not.partition(":")[0]
            raise NothingFound(f"{run}: the checkpoint of iteration {iteration} is {kind}")
    what = "valid checkpoint" if iteration is None else f"checkpoint of iteration {iteration}"
    raise NothingFound(f"{run}: no {what}")


def checkpoint_folder(run: Path) -> Path:
    """Return where a run's checkpoints are; `run` may also be that folder itself.

    Raises:
        NothingFound: there is no such folder.
    """
    if not run.is_dir():
        raise NothingFound(f"{run}: no such run folder")
    folder = run / "checkpoints"
    return folder if folder.is_dir() or not find_all(run) else run


def known_best(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the best checkpoint by the name of the metric; none where one cannot be read."""
    try:
        return read_best(str(folder))
    except OSError:
        return {}


def best_mark(best: Mapping[str, Mapping[str, Any]], iteration: int) -> str:
    """Return " (best)" for the best checkpoint; of several metrics, with their names.

    Args:
        best: see `checkpoint_retention.read_best`.
        iteration: of the checkpoint.
    """
    names = [name for name, one in best.items() if one["iteration"] == iteration]
    if not names:
        return ""
    return " (best)" if len(best) == 1 else f" (best {', '.join(names)})"


def _newest_first(run: Path) -> Iterator[Found]:
    """Verify a run's checkpoints one after the other, for as long as the caller asks for more."""
    return (_describe(path) for path in reversed(find_all(checkpoint_folder(run))))


def _describe(path: Path) -> Found:
    """Return the description of a checkpoint, or why it is damaged or cannot be read."""
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
