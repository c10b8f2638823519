"""Journal of a run's attempts: RUN/attempts.jsonl, one line per attempt, for any launcher.

Standard library only: a batch script and a submitting command import no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.checkpoint.catalog import find_all
from distrain.checkpoint.format import iteration_of
from distrain.files import atomic
from distrain.files.open_regular import read_regular
from distrain.run_layout import ATTEMPTS_FILE, CHECKPOINTS, METRICS_FILE
from distrain.scalar_names import STEP_S
from distrain.text import table

JOB_FOLDER = "slurm"
"""Folder in a run folder with the files of its job; only the run's user may read it."""

SUBMITTED_FILE = "submitted.json"
"""In JOB_FOLDER: the id of the job that was submitted last."""

RUNNING_FILE = "running.json"
"""In JOB_FOLDER: the attempt in progress; removed when its line is in ATTEMPTS_FILE."""

_MAX_BYTES = 16 << 20
_MAX_COUNT = 2**53  # larger integers are not counts
_JOB_ID = re.compile(r"[0-9]{1,20}(_[0-9]{1,20})?")


@dataclass(frozen=True)
class Attempt:
    """One start of a run's job and how it ended: a line of the journal."""

    attempt: int  # number of the start, from 1
    job_id: str  # the scheduler's; an element of a SLURM array as `12_3`
    restart: int  # number of earlier requeues of that job
    nodes: list[str]  # names
    start: float  # seconds since 1970
    end: float = 0.0
    outcome: str = ""  # finished, stopped (state saved), failed, or lost (node lost or killed)
    why: str = ""  # one line
    first_iter: int = 0  # iterations done at the start
    last_iter: int = 0  # iterations done at the end, by metrics.jsonl and the checkpoints
    kept_iter: int = 0  # iterations in the newest checkpoint; later ones are repeated
    step_s: float = 0.0  # mean seconds per iteration; 0 if not measured
    # seconds from the stop signal until all ranks had ended; 0 without a signal
    stop_s: float = 0.0
    requeued: bool = False  # whether the job was requeued on our request

    @property
    def useful_s(self) -> float:
        """Seconds spent on iterations that are in a checkpoint."""
        return max(0, self.kept_iter - self.first_iter) * self.step_s

    @staticmethod
    def parse(fields: Any) -> Attempt:
        """Return the attempt in a JSON object of unknown origin.

        Raises:
            TypeError, ValueError: wrong field, type or range.
        """
        attempt = Attempt(**of_type(fields, dict, "an attempt"))
        for entry in dataclasses.fields(Attempt):
            value = getattr(attempt, entry.name)
            match entry.type:
                case "list[str]":
                    for each in of_type(value, list, entry.name):
                        of_type(each, str, entry.name)
                case "int" | "float":
                    of_type(value, int if entry.type == "int" else (int, float), entry.name)
                    if not 0 <= value <= _MAX_COUNT:
                        raise ValueError(f"{entry.name}: expected a number >= 0")
                case _:
                    of_type(value, str if entry.type == "str" else bool, entry.name)
        return attempt


def of_type(value: Any, kind: type[Any] | tuple[type[Any], ...], name: str) -> Any:
    """Return a value of a JSON file, or raise TypeError if it is of another type."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(each.__name__ for each in kinds)
        raise TypeError(f"{name}: expected {expected}, not {type(value).__name__}")
    return value


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Return the finished attempts of a run, oldest first.

    Raises:
        OSError, TypeError, ValueError: the journal is unreadable or damaged.
    """
    try:
        data = read_regular(run_dir / ATTEMPTS_FILE, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")[:-1]  # the last line may be incomplete: it is being written
    return [Attempt.parse(json.loads(line)) for line in lines if line.strip()]


def read_running(run_dir: Path) -> Attempt | None:
    """Return the attempt in progress, if any; raises as `read_attempts`."""
    fields = _load(run_dir / JOB_FOLDER / RUNNING_FILE)
    return Attempt.parse(fields) if fields else None


def read_job_id(run_dir: Path) -> str:
    """Return the id of the job submitted last, "" without one; raises as `read_attempts`."""
    fields = _load(run_dir / JOB_FOLDER / SUBMITTED_FILE)
    job_id = str(fields.get("job_id") or "")
    if job_id and not _JOB_ID.fullmatch(job_id):  # it becomes an argument of a command
        raise ValueError(f"job_id: expected a number, not {job_id[:40]}")
    return job_id


def _load(path: Path) -> dict[str, Any]:
    try:
        data = read_regular(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return {}
    return dict(of_type(json.loads(data), dict, "content"))


def new_attempt(
    run_dir: Path, job_id: str, *, restart: int = 0, nodes: Sequence[str] = ()
) -> Attempt:
    """Return the next attempt of a run, which starts now."""
    number, now = len(read_attempts(run_dir)) + 1, time.time()
    return Attempt(number, job_id, restart, [*nodes], now, first_iter=kept(run_dir))


def begin(run_dir: Path, attempt: Attempt) -> None:
    """Record that an attempt starts."""
    (run_dir / JOB_FOLDER).mkdir(mode=0o700, exist_ok=True)
    write_json(run_dir / JOB_FOLDER / RUNNING_FILE, dataclasses.asdict(attempt))


def close(run_dir: Path, attempt: Attempt, *, outcome: str, why: str = "", **fields: Any) -> None:
    """Append an attempt that has ended to the journal, with its iterations and step time.

    `fields` are further ones of `Attempt`; `end` is now by default.
    """
    ended = dataclasses.replace(attempt, end=time.time(), outcome=outcome, why=why)
    attempt = dataclasses.replace(ended, **fields)
    kept_iter = kept(run_dir)
    last_iter, step_s = _progress(run_dir, attempt.first_iter)
    closed = dataclasses.replace(
        attempt,
        end=max(attempt.start, attempt.end),
        last_iter=max(last_iter, kept_iter, attempt.first_iter),
        kept_iter=kept_iter,
        step_s=step_s,
    )
    with (run_dir / ATTEMPTS_FILE).open("a") as file:
        file.write(json.dumps(dataclasses.asdict(closed)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    (run_dir / JOB_FOLDER / RUNNING_FILE).unlink(missing_ok=True)


def kept(run_dir: Path) -> int:
    """Return the iterations in the newest checkpoint, by its name; 0 without one."""
    found = find_all(run_dir / CHECKPOINTS)
    return iteration_of(found[-1].name) or 0 if found else 0


def _progress(run_dir: Path, first_iter: int) -> tuple[int, float]:
    """Return the iterations in metrics.jsonl, and their mean seconds from `first_iter` on."""
    last, times = 0, []
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the incomplete last line of a killed run
                last = max(last, row["iteration"] + 1)
                if row["iteration"] >= first_iter and STEP_S in row:
                    times.append(float(row[STEP_S]))
    except FileNotFoundError:
        return 0, 0.0
    return last, sum(times) / len(times) if times else 0.0


def summary(attempts: Sequence[Attempt]) -> str:
    """Return a table of attempts, then the repeated iterations and the goodput.

    Goodput is the time of the iterations in checkpoints over the time since the first start,
    waiting in the queue included.
    """
    rows = [("attempt", "job", "nodes", "iterations", "kept", "lasted", "outcome", "why")]
    for a in attempts:
        done, lasted = f"{a.first_iter}-{a.last_iter}", f"{a.end - a.start:.0f} s"
        cells = (str(a.attempt), a.job_id, ",".join(a.nodes), done, str(a.kept_iter), lasted)
        rows.append((*cells, a.outcome, a.why.splitlines()[0] if a.why else ""))
    lost = sum(max(0, a.last_iter - a.kept_iter) for a in attempts)
    total_s = attempts[-1].end - attempts[0].start if attempts else 0.0
    useful_s = sum(a.useful_s for a in attempts)
    goodput = f", goodput {useful_s / total_s:.0%}" if useful_s and total_s > 0 else ""
    return f"{table(rows)}\n{lost} iterations lost{goodput}"


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a small JSON file completely or not at all."""
    atomic.write(path, json.dumps(fields).encode(), sync=False)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; {} if it is missing or damaged."""
    try:
        return _load(path)
    except (TypeError, ValueError):
        return {}
