"""Summary of a run: state, progress, goodput, estimated time to its end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.launch.client import JobStatus, State
from distrain.run_layout import LOGS, METRICS_FILE
from distrain.runs.find import find_runs, name_of
from distrain.runs.records import Files, last_values, mtime, node, number, read
from distrain.runs.states import statuses
from distrain.scalar_names import STEP_S

_MAX_S = 1e10  # 300 years: longer times are not measurements


@dataclass(frozen=True)
class Summary:
    """One row of the table of runs."""

    name: str  # of the run, below the folder of the table
    files: Files  # of the run
    state: State  # current state
    why: str  # one line about it
    values: dict[str, float]  # last values of its scalars
    eta_s: float | None  # seconds to its end, None if it is not running
    ranks: int | None  # number of ranks, None if unknown
    goodput: float | None  # time of the iterations that count over all time; None if unknown
    job_id: str  # the scheduler's, "" without a job
    started: float | None  # first start, in seconds since 1970; None if not recorded
    age_s: float  # seconds since its last write

    @property
    def group(self) -> str:
        """Folder of its sweep, "" without one."""
        return self.name.rpartition("/")[0]


def summarize(folder: Path) -> tuple[list[Summary], str]:
    """Return all runs below a folder, by name, and a notice of a scheduler, "" without one.

    Raises:
        ConfigError: there is no such folder.
    """
    paths = find_runs(folder)
    return _summaries(paths, [name_of(path, folder) for path in paths])


def _summaries(paths: Sequence[Path], names: Sequence[str]) -> tuple[list[Summary], str]:
    found, notice = statuses([read(path) for path in paths])
    now, rows = time.time(), zip(names, found, strict=True)
    return [_summary(name, files, status, now) for name, (files, status) in rows], notice


def _summary(name: str, files: Files, status: JobStatus, now: float) -> Summary:
    state = status.state
    return Summary(
        name=name,
        files=files,
        state=state,
        why=status.why,
        values=last_values(files.rows),
        eta_s=_eta_s(files, now) if state == State.RUNNING else None,
        ranks=_ranks(files),
        goodput=_goodput(files, state, now),
        job_id=files.job_id if files.client is not None else "",
        started=files.starts[0].time if files.starts else None,
        age_s=max(0.0, now - files.last_write_s()),
    )


def summarize_one(path: Path) -> Summary:
    """Return the summary of one run."""
    (summary,) = summaries([path])
    return summary


def summaries(paths: Sequence[Path]) -> list[Summary]:
    """Return the summaries of runs; a scheduler is asked once."""
    return _summaries(paths, [str(path) for path in paths])[0]


def _step_s(files: Files) -> float | None:
    """Return the mean seconds per iteration in the last rows; None if not measured."""
    times = [row[STEP_S] for row in files.rows if 0 < row.get(STEP_S, 0) < _MAX_S]
    return sum(times) / len(times) if times else None


def _eta_s(files: Files, now: float) -> float | None:
    """Return the seconds to the end: iterations left times their mean time, minus the row's age."""
    step_s = _step_s(files)
    if step_s is None or not files.max_iter:
        return None
    written = mtime(files.path / METRICS_FILE)
    left_s = (files.max_iter - files.iteration) * step_s
    return min(_MAX_S, max(0.0, left_s - max(0.0, now - written)))


def _ranks(files: Files) -> int | None:
    """Return the number of ranks that were requested, else of those with a log."""
    launch = node(files.conf, "launch")
    if launch.get("in_process"):
        return 1
    asked = launch.get("ranks") or launch.get("gpus_per_node") or ("nodes" in launch and 1)
    nodes = number(launch.get("nodes")) or 1
    if files.running is not None:
        nodes = len(files.running.nodes) or 1
    if number(asked):
        return number(asked) * nodes
    try:
        names = [path.stem for path in (files.path / LOGS).iterdir()]
    except OSError:
        return None
    return len([name for name in names if name.startswith("rank_")]) or None


def _goodput(files: Files, state: State, now: float) -> float | None:
    """Return the time of iterations that count over all time since the first start.

    All time is, for jobs, the time since the first attempt, waiting in the queue included; else the
    time of all starts, each until its end, or until the next start if none was recorded. Iterations
    count if they are in a checkpoint, or the run is running.

    Example: 900 iterations of 0.1 s in 100 s give 0.9.
    """
    step_s = _step_s(files)
    if step_s is None:
        return None
    is_running = state == State.RUNNING
    last = now if is_running else files.last_write_s()
    attempts = [*files.attempts, *([files.running] if files.running is not None else [])]
    if files.client is not None and attempts:
        useful_s = sum(attempt.useful_s for attempt in files.attempts)
        if files.running is not None:
            useful_s += max(0, files.iteration - files.running.first_iter) * step_s
        total_s = (attempts[-1].end or last) - attempts[0].start
    else:
        useful_s = (files.iteration if is_running else files.kept_iter) * step_s
        following = [*(start.time for start in files.starts[1:]), None]
        total_s = sum(
            max(0.0, (start.end or after or last) - start.time)
            for start, after in zip(files.starts, following, strict=False)
        )
    return min(1.0, useful_s / total_s) if total_s > 0 and useful_s > 0 else None


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a run as JSON values; non-finite numbers are strings, as in metrics.jsonl."""
    files = summary.files
    names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
    values = {name: names.get(str(v), v) for name, v in summary.values.items()}
    of_run = {
        field.name: getattr(summary, field.name)
        for field in dataclasses.fields(summary)
        if field.name != "files"
    }
    of_files = {name: getattr(files, name) for name in ("iteration", "max_iter", "kept_iter")}
    path = {"path": str(files.path.absolute()), "group": summary.group}
    return of_run | of_files | path | {"state": str(summary.state), "values": values}
