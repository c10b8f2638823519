"""One run on a page of text: values, starts, attempts, checkpoints, configuration, logs."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import yaml

from distrain.checkpoint.catalog import find_all
from distrain.checkpoint.format import CheckpointDamaged, iteration_of, read_manifest
from distrain.checkpoint.mirror_status import read_status
from distrain.checkpoint.retention import best_mark, known_best
from distrain.files.open_regular import read_tail
from distrain.redact import masked, masked_overrides, masked_text
from distrain.run_layout import CHECKPOINTS, LOGS
from distrain.runfolder.attempts import summary
from distrain.runs.escape import escaped, escaped_lines
from distrain.runs.records import Files, Start, all_rows, last_values, mtime
from distrain.runs.summary import Summary, summarize_one
from distrain.runs.table import METRIC, cells, report_missing, titles
from distrain.scalar_names import DIAGNOSTIC_PREFIXES

_MAX_LOGS = 4
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError)
_TAIL_BYTES = 1 << 16


def show(path: Path, *, lines: int, metric: str | None, is_full: bool = False) -> int:
    """Print a run, with the last `lines` of its logs and a metric in the heading; return 0.

    None shows `METRIC`.
    """
    run = summarize_one(path)
    for title, body in _sections(run, lines=lines, metric=metric, is_full=is_full):
        title, body = escaped(title), escaped_lines(body)
        print(f"{title}\n{_indented(body)}\n" if body else f"{title}\n")
    sys.stdout.flush()
    return 0


def _sections(
    run: Summary, *, lines: int, metric: str | None, is_full: bool
) -> Iterator[tuple[str, str]]:
    files = run.files
    values = last_values(list(all_rows(files.path)))
    run = dataclasses.replace(run, values=values)  # the summary has those of the last rows alone
    report_missing(metric, values, "not in this run")
    metric = metric or METRIC
    why = f": {run.why}" if run.why else ""
    facts = zip(titles(metric)[2:], cells(run, metric, name=run.name)[2:], strict=True)
    title = f"{files.path}: {run.state}{why}"
    yield title, "\n".join(f"{name:<10} {cell}" for name, cell in facts)
    if not is_full:
        values = {name: v for name, v in values.items() if not name.startswith(DIAGNOSTIC_PREFIXES)}
    width = max(map(len, values), default=0)
    yield "last values", "\n".join(f"{name:<{width}}  {v:.6g}" for name, v in values.items())
    yield "starts", "\n".join(map(_start, files.starts))
    if files.attempts:
        yield "attempts", summary(files.attempts)
    yield "checkpoints", _checkpoints(files)
    if mirror := read_status(files.path):
        yield "mirror of the checkpoints", mirror.line()
    yield "configuration", _configuration(files)
    for log in logs(files, run.why)[:_MAX_LOGS]:
        yield f"the end of {log}", tail(log, lines)


def _start(start: Start) -> str:
    """Return a line about a start: time, host, commit, end, command."""
    if start.end is None:
        end = "no end recorded"
    else:
        why = f" ({start.why})" if start.why else ""
        end = f"exit code {start.code}{why} after {start.end - start.time:.0f} s"
    commit = str(start.git.get("commit", ""))[:10] or "no git"
    changed = " + changes" if start.git.get("changed") else ""
    when = f"{datetime.fromtimestamp(start.time):%Y-%m-%d %H:%M:%S}"
    command = " ".join(masked_overrides(start.argv))
    line = f"{when} on {start.host}, {commit}{changed}, {end}: {command}"
    return "\n  ".join([line, *map(masked_text, start.changes)])


def _checkpoints(files: Files) -> str:
    folder = files.path / CHECKPOINTS
    try:
        paths = find_all(folder)
    except OSError as error:
        return f"unreadable: {error}"
    best, lines = known_best(folder), []
    for path in paths:
        iteration = iteration_of(path.name)
        try:
            manifest = read_manifest(os.fspath(path))
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            text = f"{manifest['world_size']} ranks, {size / 1e6:.1f} MB, {manifest['created']}"
        except (CheckpointDamaged, ArithmeticError, *_DAMAGE) as error:
            text = f"damaged: {error}"
        except OSError as error:
            text = f"unreadable: {error}"
        lines.append(f"{iteration}: {text}{best_mark(best, iteration or 0)}")
    return "\n".join(lines) or "none"


def logs(files: Files, why: str) -> list[Path]:
    """Return a run's logs: of the failed rank named in `why`, of the job, of rank 0, by age."""
    folder = files.path / LOGS
    failed = re.search(r"\branks? (\d+)", why)
    first = [folder / f"rank_{failed[1]}.log"] if failed else []
    if files.client is not None and not files.unreadable:
        first += files.client().logs(files.path)
    first.append(folder / "rank_0.log")
    others = sorted(folder.glob("rank_*.log"), key=mtime, reverse=True)
    return [log for log in dict.fromkeys([*first, *others]) if _size(log)]


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a text file."""
    try:
        text = read_tail(path, max_bytes=_TAIL_BYTES).decode(errors="replace")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "\n".join(map(masked_text, text.splitlines()[-lines:])) if lines > 0 else ""


def _configuration(files: Files) -> str:
    return yaml.safe_dump(masked(files.conf), sort_keys=False) if files.conf else ""


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
