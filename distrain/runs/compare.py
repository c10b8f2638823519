"""Two runs side by side: their configurations, their code, their last values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distrain.runfolder import differences
from distrain.runs.files import Start, all_rows, last_values, read_conf, read_starts

_MAX_WIDTH = 60


def compare(left: Path, right: Path) -> int:
    """Print what differs between two runs, and their last values; return 0.

    Args:
        left: a run folder.
        right: another one.
    """
    names = (str(left), str(right))
    print(_aligned("configuration", names, _configuration(left, right), "no key differs"))
    print(_aligned("\ncode", names, list(_code(left, right)), "the same commit and versions"))
    print(_aligned("\nlast values", (*names, "difference"), _values(left, right), "none shared"))
    return 0


def _configuration(left: Path, right: Path) -> list[list[str]]:
    """Return the keys that differ, each with both values; names and folders always do."""
    changed = differences(read_conf(left), read_conf(right))
    return [
        [key, _text(old), _text(new)]
        for key, (old, new) in changed.items()
        if not key.startswith("run.")
    ]


def _code(left: Path, right: Path) -> Iterator[list[str]]:
    """Yield what differs between the last starts: the commit, changes to it, versions."""
    a, b = (_last_start(path) for path in (left, right))
    commits = [str(start.git.get("commit") or "no git") if start else "-" for start in (a, b)]
    if commits[0] != commits[1]:
        yield ["commit", *(commit[:10] for commit in commits)]
    diffs = [_diff(path, start) for path, start in ((left, a), (right, b))]
    if diffs[0] != diffs[1]:
        yield ["changes since", *(_size(path, s) for path, s in ((left, a), (right, b)))]
    versions = [start.versions if start else {} for start in (a, b)]
    for package in dict.fromkeys([*versions[0], *versions[1]]):
        pair = [str(each.get(package, "-")) for each in versions]
        if pair[0] != pair[1]:
            yield [package, *pair]


def _values(left: Path, right: Path) -> list[list[str]]:
    """Return the last values of the scalars that both runs have."""
    a, b = (last_values(list(all_rows(path))) for path in (left, right))
    shared = [name for name in a if name in b]
    return [
        [name, f"{a[name]:.6g}", f"{b[name]:.6g}", f"{b[name] - a[name]:+.3g}"] for name in shared
    ]


def _last_start(path: Path) -> Start | None:
    starts = read_starts(path)
    return starts[-1] if starts else None


def _diff(path: Path, start: Start | None) -> str:
    """Return what differed from the commit when a run was started last; "" if nothing did."""
    name = start.git.get("diff") if start else None
    try:
        return (path / str(name)).read_text(errors="replace") if name else ""
    except OSError:
        return ""


def _size(path: Path, start: Start | None) -> str:
    text = _diff(path, start)
    name = start.git.get("diff") if start else ""
    return f"{len(text.splitlines())} lines ({path / str(name)})" if text else "none"


def _text(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 3] + "..."


def _aligned(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], none: str) -> str:
    """Return a table of text with its title over the first column."""
    start = "\n" * title.startswith("\n")
    title = title.strip()
    if not rows:
        return f"{start}{title}: {none}"
    full = [[title, *names], *rows]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in full]
    return start + "\n".join(line.rstrip() for line in lines)
