"""Table of the runs in a folder: for a terminal, as plain text, as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from distrain.checks import did_you_mean
from distrain.launch.client import State
from distrain.runs.escape import escaped
from distrain.runs.records import all_rows
from distrain.runs.summary import Summary, as_json, summarize
from distrain.text import table

COLUMNS = (
    *("name", "state", "iteration", "metric", "eta", "ranks", "goodput", "job", "started"),
    "seen",
)
"""Columns, and values of `--sort`; the title of "metric" is the scalar's name."""

METRIC = "loss"
"""Scalar that is shown if none is chosen."""

_COLORS = {
    State.QUEUED: "cyan",
    State.RUNNING: "green",
    State.PREEMPTED: "magenta",
    State.STOPPED: "yellow",
    State.FINISHED: "blue",
    State.FAILED: "red",
    State.DEAD: "red",
    State.UNREADABLE: "red",
}
_FIRST_LEFT_OUT = ("job", "started", "goodput", "ranks", "seen", "eta")
_MIN_NAME = 16
_RIGHT = ("iteration", "metric", "eta", "ranks", "goodput")


def show_table(
    folder: Path,
    *,
    metric: str | None,
    sort: str,
    is_reversed: bool,
    states: Sequence[State],
    as_data: bool,
) -> int:
    """Print the runs below a folder, of all states if `states` is empty; return 0.

    A metric that is chosen is looked for in all rows of a run; None shows `METRIC`.

    Raises:
        ConfigError: there is no such folder.
    """
    summaries, notice = summarize(folder)
    if notice:
        print(f"distrain.runs: {notice}", file=sys.stderr)
    chosen = [each for each in summaries if not states or each.state in states]
    if metric is not None:
        chosen = [_with_metric(each, metric) for each in chosen]
    names = list(dict.fromkeys(name for each in chosen for name in each.values))
    report_missing(metric, names, "in none of the runs")
    metric = metric or METRIC
    chosen = in_order(chosen, sort, metric=metric, is_reversed=is_reversed)
    if as_data:
        print(json.dumps([as_json(each) for each in chosen], indent=1, allow_nan=False))
    elif not chosen:
        which = " or ".join(states) + " " if states else ""
        print(f"distrain.runs: no {which}runs in {folder}", file=sys.stderr)
    elif sys.stdout.isatty():
        _print_rich(chosen, metric, sys.stdout)
    else:
        print(as_text(chosen, metric))
    return 0


def report_missing(metric: str | None, names: Collection[str], where: str) -> None:
    """Print a notice if a metric was chosen that is not among the names, if there are any."""
    if metric is not None and names and metric not in names:
        hint = did_you_mean(metric, names)
        print(escaped(f"distrain.runs: --metric {metric}: {where}; {hint}"), file=sys.stderr)


def _with_metric(summary: Summary, metric: str) -> Summary:
    """Return a summary with the last value of a metric, also if the last rows do not have it."""
    if metric in summary.values or not summary.values:
        return summary
    found = [row[metric] for row in all_rows(summary.files.path) if metric in row]
    if not found:
        return summary
    return dataclasses.replace(summary, values=summary.values | {metric: found[-1]})


def in_order(
    summaries: Sequence[Summary], sort: str, *, metric: str, is_reversed: bool = False
) -> list[Summary]:
    """Return sorted runs; a sweep takes the place of its first run, unknown values come last."""
    key = _key(sort, metric)

    known = [each for each in summaries if key(each) is not None]
    unknown = [each for each in summaries if key(each) is None]
    units: dict[str, list[Summary]] = {}  # the runs of a sweep, or one other run
    for each in [*sorted(known, key=key, reverse=is_reversed), *unknown]:
        units.setdefault(f"{each.group}/" if each.group else each.name, []).append(each)
    return [each for unit in units.values() for each in unit]


def _key(sort: str, metric: str) -> Callable[[Summary], Any]:
    """Return the sort key of a column; it gives None for an unknown value."""
    keys: dict[str, Callable[[Summary], Any]] = {
        "name": lambda each: each.name,
        "state": lambda each: list(State).index(each.state),
        "iteration": lambda each: each.files.iteration,
        "metric": lambda each: _finite(each.values.get(metric)),
        "eta": lambda each: each.eta_s,
        "ranks": lambda each: each.ranks,
        "goodput": lambda each: each.goodput,
        "job": lambda each: [int(n) for n in each.job_id.split("_") if n.isdigit()] or None,
        "started": lambda each: each.started,
        "seen": lambda each: each.age_s,
    }
    return keys[sort]


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value else value


def cells(summary: Summary, metric: str, *, name: str) -> list[str]:
    """Return a row of the table as text."""
    files = summary.files
    value, started = summary.values.get(metric), summary.started
    total = f"/{files.max_iter}" if files.max_iter else ""
    return [
        escaped(name),
        str(summary.state),
        f"{files.iteration}{total}",
        "-" if value is None else f"{value:.4g}",
        "-" if summary.eta_s is None else str(timedelta(seconds=int(summary.eta_s))),
        "-" if summary.ranks is None else str(summary.ranks),
        "-" if summary.goodput is None else f"{summary.goodput:.0%}",
        summary.job_id or "-",
        "-" if started is None else f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M}",
        f"{ago(summary.age_s)} ago",
    ]


def ago(age_s: float) -> str:
    """Return a time span in one unit. Example: 59 s, 60 min, 47 h, 2 d."""
    for unit_s, unit in ((86400 * 2, "d"), (7200, "h"), (120, "min")):
        if age_s >= unit_s:
            return f"{age_s / (unit_s / 2):.0f} {unit}"
    return f"{age_s:.0f} s"


def _rows(summaries: Sequence[Summary], metric: str) -> list[tuple[State | None, list[str]]]:
    """Return one row per run, and before the runs of a sweep one with their states."""
    rows: list[tuple[State | None, list[str]]] = []
    for group, members in groupby(summaries, key=lambda each: each.group):
        runs = list(members)
        if group:
            counts = Counter(each.state for each in runs)
            states = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
            rows.append((None, [f"{escaped(group)}/  {states}"]))
        for each in runs:
            name = "  " + each.name.rpartition("/")[2] if group else each.name
            rows.append((each.state, cells(each, metric, name=name)))
    return rows


def titles(metric: str) -> list[str]:
    """Return the titles of the columns."""
    return [escaped(metric) if column == "metric" else column for column in COLUMNS]


def as_text(summaries: Sequence[Summary], metric: str) -> str:
    """Return the table as plain text."""
    rows = [titles(metric), *(cells for _, cells in _rows(summaries, metric))]
    return table(rows, right=[COLUMNS.index(column) for column in _RIGHT])


def fitted(
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    columns: Sequence[str] = COLUMNS,
    first_left_out: Sequence[str] = _FIRST_LEFT_OUT,
    cut: str = COLUMNS[0],
) -> tuple[list[list[str]], list[int], list[str]]:
    """Return the rows that fit into a width, the columns kept, and the names of those left out.

    No cell is cut but those of one column: they keep their ends, and at least 16 characters.

    Args:
        rows: the titles and the cells of all columns; a row of one cell is a title.
        width: of the terminal, in characters.
        columns: names.
        first_left_out: names of columns, the least important first.
        cut: name of the column that is cut.
    """
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(columns))]
    kept, long = list(range(len(columns))), columns.index(cut)
    for column in first_left_out:
        others = sum(widths[i] + 2 for i in kept if i != long)
        if min(widths[long], _MIN_NAME) + others <= width:
            break
        kept.remove(columns.index(column))
    room = max(_MIN_NAME, width - sum(widths[i] + 2 for i in kept if i != long))
    fit = [
        [shortened(row[i], room if i == long else width) for i in kept]
        if len(row) > 1
        else [shortened(row[0], width)]
        for row in rows
    ]
    return fit, kept, [name for i, name in enumerate(columns) if i not in kept]


def shortened(name: str, width: int) -> str:
    """Return a name of at most `width` characters: its middle gives way, its ends tell it."""
    if len(name) <= width:
        return name
    end = (width - 1) // 2
    return f"{name[: width - 1 - end]}…{name[len(name) - end :]}"


def _print_rich(summaries: Sequence[Summary], metric: str, stream: TextIO) -> None:
    from rich.console import Console  # only where there is a terminal
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    states = [None, *(state for state, _ in _rows(summaries, metric))]
    rows = [titles(metric), *(cells for _, cells in _rows(summaries, metric))]
    cut, kept, left_out = fitted(rows, console.width)
    lines = table(cut, right=[kept.index(i) for i in map(COLUMNS.index, _RIGHT) if i in kept])
    for state, row, line in zip(states, cut, lines.splitlines(), strict=True):
        text = Text(line, style="" if state else "bold", no_wrap=True)
        if state:
            text.highlight_words([row[1]], _COLORS[state])
        console.print(text)
    if left_out:
        names = ", ".join(left_out)
        console.print(Text(f"not shown: {names}; see --json", style="dim"))
