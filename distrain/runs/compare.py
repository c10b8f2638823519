"""Compare two runs: configuration, code, last values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distrain.checks import shown
from distrain.files.open_regular import read_regular
from distrain.redact import masked
from distrain.runfolder.differences import differences
from distrain.runfolder.provenance import LEFT_OUT
from distrain.runs.escape import escaped
from distrain.runs.records import Files, Start, all_rows, last_values, read
from distrain.scalar_names import DIAGNOSTIC_PREFIXES
from distrain.text import table

_MAX_WIDTH = 60
_MAX_DIFF_BYTES = 32 << 20


def compare(left: Path, right: Path, *, is_full: bool = False) -> int:
    """Print the differences of two runs, and their last values; return 0."""
    names = (str(left), str(right))
    a, b = read(left), read(right)
    for files in (a, b):
        if files.unreadable:
            print(escaped(f"{files.path}: unreadable: {files.unreadable}"))
    print(_section("configuration", names, _configuration(a, b), "no key differs"))
    print(f"\n{_section('code', names, *_code(a, b))}")
    values = _values(left, right, is_full=is_full)
    print(f"\n{_section('last values', (*names, 'difference'), values, 'none shared')}")
    return 0


def _configuration(left: Files, right: Files) -> list[list[str]]:
    """Return the keys that differ, with both values; run.* always differs."""
    changed = differences(masked(left.conf), masked(right.conf))
    return [
        [key, shown(old, most=_MAX_WIDTH), shown(new, most=_MAX_WIDTH)]
        for key, (old, new) in changed.items()
        if not key.startswith("run.")
    ]


def _code(left: Files, right: Files) -> tuple[list[list[str]], str]:
    """Return the differences between the last starts, and the text for none."""
    rows = []
    starts = [files.starts[-1] if files.starts else None for files in (left, right)]
    commits = [str(start.git.get("commit") or "") if start else "" for start in starts]
    diffs = [_diff(f.path, s) for f, s in zip((left, right), starts, strict=True)]
    none = "the same commit and versions"
    if not all(commits):
        none = "unknown, not in git"
    elif None in diffs:
        none = "unknown, the changes since the commit are not kept"
    versions = [start.versions if start else {} for start in starts]
    for package in dict.fromkeys([*versions[0], *versions[1]]):
        pair = [str(each.get(package, "-")) for each in versions]
        if pair[0] != pair[1]:
            rows.append([package, *pair])
    if all(commits) and diffs[0] != diffs[1]:
        rows.insert(0, ["changes since", *map(_size, diffs)])
    if commits[0] != commits[1] or (rows and not all(commits)):
        rows.insert(0, ["commit", *(commit[:10] or "unknown, not in git" for commit in commits)])
    return rows, none


def _values(left: Path, right: Path, *, is_full: bool) -> list[list[str]]:
    """Return the last values of the scalars of both runs."""
    a, b = (last_values(list(all_rows(path))) for path in (left, right))
    hidden = () if is_full else DIAGNOSTIC_PREFIXES
    shared = [name for name in a if name in b and not name.startswith(hidden)]
    return [
        [name, f"{a[name]:.6g}", f"{b[name]:.6g}", f"{b[name] - a[name]:+.3g}"] for name in shared
    ]


def _diff(path: Path, start: Start | None) -> str | None:
    """Return the changes since the commit at the last start; None if unknown."""
    name = start.git.get("diff") if start else None
    if not name:
        return None if start and start.git.get("changed") else ""
    try:
        data = read_regular(path / Path(str(name)).name, max_bytes=_MAX_DIFF_BYTES)
    except (OSError, ValueError):
        return None
    return None if data.startswith(LEFT_OUT.encode()) else data.decode(errors="replace")


def _size(diff: str | None) -> str:
    return "unknown" if diff is None else f"{len(diff.splitlines())} lines" if diff else "none"


def _section(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], none: str) -> str:
    """Return a table with its title over the first column."""
    if not rows:
        return f"{title}: {none}"
    return table([[escaped(cell) for cell in row] for row in [[title, *names], *rows]])
