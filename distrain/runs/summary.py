"""One run in a line: how far it is, how it goes, when it will be done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.run_layout import LOGS, METRICS_FILE
from distrain.runs.find import find_runs, name_of
from distrain.runs.records import Files, last_values, mtime, node, number, read
from distrain.runs.states import Queue, State, ask_slurm, open_job, state_of
from distrain.scalar_names import STEP_S

_LONGEST_S = 1e10  # 300 years; what takes longer is no measurement


@dataclass(frozen=True)
class Summary:
    """What a table says of a run.

    Attributes:
        name: of the run, below the folder that was looked at.
        files: of the run.
        state: what it is doing.
        why: one line about that.
        values: the last values of its scalars.
        eta_s: seconds to its end, None if it is not running.
        ranks: how many it has, None if it is unknown.
        goodput: the time of iterations that count over all time; None if it is unknown.
        job_id: SLURM's, "" without one.
        started: for the first time, in seconds since 1970; None if nobody noted it.
        age_s: seconds since it last wrote something.
    """

    name: str
    files: Files
    state: State
    why: str
    values: dict[str, float]
    eta_s: float | None
    ranks: int | None
    goodput: float | None
    job_id: str
    started: float | None
    age_s: float

    @property
    def group(self) -> str:
        """The folder that it shares with the others of its sweep, "" without one."""
        return self.name.rpartition("/")[0]


def summarize(folder: Path) -> tuple[list[Summary], str]:
    """Return all runs below a folder, by name, and what SLURM fails to say, "" if nothing.

    Raises:
        ConfigError: there is no such folder.
    """
    paths = find_runs(folder)
    return summarize_these(paths, [name_of(path, folder) for path in paths])


def summarize_these(paths: Sequence[Path], names: Sequence[str]) -> tuple[list[Summary], str]:
    """Return some runs as `summarize`; SLURM is asked once for all of them."""
    found = [read(path) for path in paths]
    queue, notice = ask_slurm(job for files in found if (job := open_job(files)))
    now = time.time()
    return [_summary(n, f, queue, now) for n, f in zip(names, found, strict=True)], notice


def _summary(name: str, files: Files, queue: Queue | None, now: float) -> Summary:
    state, why = state_of(files, queue)
    return Summary(
        name=name,
        files=files,
        state=state,
        why=why,
        values=last_values(files.rows),
        eta_s=_eta_s(files, now) if state == State.RUNNING else None,
        ranks=_ranks(files),
        goodput=_goodput(files, state, now),
        job_id=files.submitted_id if files.is_on_slurm else "",
        started=files.starts[0].time if files.starts else None,
        age_s=max(0.0, now - files.last_sign()),
    )


def summarize_one(path: Path) -> Summary:
    """Return one run as `summarize`."""
    (summary,), _ = summarize_these([path], [str(path)])
    return summary


def _step_s(files: Files) -> float | None:
    """Return the mean time of an iteration in the last rows; None if nobody measured it."""
    times = [row[STEP_S] for row in files.rows if 0 < row.get(STEP_S, 0) < _LONGEST_S]
    return sum(times) / len(times) if times else None


def _eta_s(files: Files, now: float) -> float | None:
    """Return the seconds to the end: iterations left times their mean time, less the row's age."""
    step_s = _step_s(files)
    if step_s is None or not files.max_iter:
        return None
    written = mtime(files.path / METRICS_FILE)
    left_s = (files.max_iter - files.iteration) * step_s
    return min(_LONGEST_S, max(0.0, left_s - max(0.0, now - written)))


def _ranks(files: Files) -> int | None:
    """Return how many ranks a run has: what was asked for, else how many have a log."""
    launch = node(files.conf, "launch")
    if launch.get("in_process"):
        return 1
    asked = launch.get("ranks") or launch.get("gpus_per_node") or ("nodes" in launch and 1)
    nodes = number(launch.get("nodes")) or 1
    if files.running is not None:
        nodes = len(files.running.nodes)
    if number(asked):
        return number(asked) * nodes
    try:
        names = [path.stem for path in (files.path / LOGS).iterdir()]
    except OSError:
        return None
    return len([name for name in names if name.startswith("rank_")]) or None


def _goodput(files: Files, state: State, now: float) -> float | None:
    """Return the time of iterations that count over all time since the first start.

    On SLURM that is all since the first attempt, waiting in the queue between two included; else
    the time of all starts, each until its end, or until the next if it noted none. Iterations count
    that are in a checkpoint, or done by a run that goes on.

    Example: 900 iterations of 0.1 s in 100 s give 0.9.
    """
    step_s = _step_s(files)
    if step_s is None:
        return None
    is_running = state == State.RUNNING
    last = now if is_running else files.last_sign()
    if files.is_on_slurm:
        attempts = [*files.attempts, *([files.running] if files.running is not None else [])]
        useful_s = sum(attempt.useful_s for attempt in files.attempts)
        if files.running is not None:
            useful_s += max(0, files.iteration - files.running.first_iter) * step_s
        total_s = (attempts[-1].end or last) - attempts[0].start if attempts else 0.0
    else:
        useful_s = (files.iteration if is_running else files.kept_iter) * step_s
        following = [*(start.time for start in files.starts[1:]), None]
        total_s = sum(
            max(0.0, (start.end or after or last) - start.time)
            for start, after in zip(files.starts, following, strict=False)
        )
    return min(1.0, useful_s / total_s) if total_s > 0 and useful_s > 0 else None


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a run as JSON values; numbers that are not finite are strings, as in metrics.jsonl."""
    files = summary.files
    names = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
    values = {name: names.get(str(v), v) for name, v in summary.values.items()}
    return {
        "name": summary.name,
        "path": str(files.path.absolute()),
        "group": summary.group,
        "state": str(summary.state),
        "why": summary.why,
        "iteration": files.iteration,
        "max_iter": files.max_iter,
        "kept_iter": files.kept_iter,
        "values": values,
        "eta_s": summary.eta_s,
        "ranks": summary.ranks,
        "goodput": summary.goodput,
        "job_id": summary.job_id,
        "started": summary.started,
        "age_s": summary.age_s,
    }
