"""What the files of a run's folder say, however far the run has come with writing them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from distrain.checkpoint_format import iteration_of
from distrain.checkpoint_found import find_all
from distrain.launch.slurm_attempts import (
    RUNNING_FILE,
    SLURM_FOLDER,
    SUBMITTED_FILE,
    Attempt,
    read_attempts,
    read_json,
)

METRICS_FILE = "metrics.jsonl"
TAIL_BYTES = 1 << 16

_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: 1 ms a run, not 10
_OF_SLURM = ("distrain.launch.slurm.", "distrain.launch.allocation.")


@dataclass(frozen=True)
class Start:
    """One start of a run's command, from command.json.

    Attributes:
        argv: the command's arguments.
        overrides: those of this very run; None if nobody noted them.
        folder: where the command was given.
        host: the machine's name.
        time: in seconds since 1970.
        end: when it ended, in seconds since 1970; None if it has not, or could not say so.
        code: how it ended; None as before.
        why: one line about a failure.
        git: the repository's `commit`, whether it was `changed`, the file of the `diff`.
        versions: of packages.
    """

    argv: list[str]
    overrides: list[str] | None
    folder: str
    host: str
    time: float
    end: float | None
    code: int | None
    why: str
    git: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Files:
    """What lies in a run's folder.

    Attributes:
        path: the folder.
        conf: the frozen configuration; empty if it cannot be read.
        starts: of the command.
        rows: the last rows of metrics.jsonl.
        kept_iter: iterations that the newest checkpoint holds, by its name; 0 without one.
        attempts: on SLURM that are over.
        running: the attempt on SLURM that has begun and noted no end.
        submitted_id: the SLURM job that was submitted last, "" without one.
    """

    path: Path
    conf: dict[str, Any]
    starts: list[Start]
    rows: list[dict[str, Any]]
    kept_iter: int
    attempts: list[Attempt] = field(default_factory=list)
    running: Attempt | None = None
    submitted_id: str = ""

    @property
    def max_iter(self) -> int:
        """How many iterations the run is to have; 0 if nobody knows."""
        return number(node(self.conf, "trainer").get("max_iter"))

    @property
    def iteration(self) -> int:
        """How many iterations are done, as far as metrics.jsonl and the checkpoints tell."""
        return max(int(self.rows[-1]["iteration"]) + 1 if self.rows else 0, self.kept_iter)

    @property
    def is_on_slurm(self) -> bool:
        """Whether its last start was on SLURM."""
        return str(node(self.conf, "launch").get("_target_")).startswith(_OF_SLURM)

    def last_sign(self) -> float:
        """Return when the run last wrote something, in seconds since 1970."""
        names = [METRICS_FILE, "command.json", "checkpoints", "logs", "logs/rank_0.log"]
        names += [SLURM_FOLDER] if self.is_on_slurm else []
        return max(mtime(self.path / name) for name in names)


def read(path: Path) -> Files:
    """Read a run's folder; of metrics.jsonl the end only.

    Args:
        path: the run folder.
    """
    found = find_all(path / "checkpoints")
    slurm = path / SLURM_FOLDER
    return Files(
        path=path,
        conf=read_conf(path),
        starts=read_starts(path),
        rows=last_rows(path),
        kept_iter=iteration_of(found[-1].name) or 0 if found else 0,
        attempts=_attempts(path),
        running=_attempt(read_json(slurm / RUNNING_FILE)),
        submitted_id=str(read_json(slurm / SUBMITTED_FILE).get("job_id") or ""),
    )


def read_conf(path: Path) -> dict[str, Any]:
    """Return the frozen configuration; empty if it cannot be read."""
    try:
        conf = yaml.load((path / "run.yaml").read_bytes(), _Loader)
    except (OSError, yaml.YAMLError):
        return {}
    return conf if isinstance(conf, dict) else {}


def node(conf: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a node of a configuration; empty if it is none."""
    found = conf.get(name)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> int:
    """Return a number of a configuration; 0 if it is none."""
    return value if isinstance(value, int) else 0


def read_starts(path: Path) -> list[Start]:
    """Return the starts of a run's command that are noted, oldest first."""
    starts = read_json(path / "command.json").get("starts")
    if not isinstance(starts, list):
        return []
    return [_start(each) for each in starts if isinstance(each, dict)]


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows in the last 64 KiB of metrics.jsonl, oldest first."""
    try:
        with (path / METRICS_FILE).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return [row for line in lines if (row := _row(line)) is not None]


def all_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all rows of metrics.jsonl, oldest first."""
    try:
        with (path / METRICS_FILE).open("rb") as file:
            for line in file:
                row = _row(line)
                if row is not None:
                    yield row
    except OSError:
        return


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and the values of a scalar."""
    points = [(row["iteration"], row[name]) for row in rows if name in row]
    return [iteration for iteration, _ in points], [value for _, value in points]


def last_values(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last value of each scalar."""
    values: dict[str, float] = {}
    for row in rows:
        values |= row
    values.pop("iteration", None)
    return values


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a row, with "NaN" and "Infinity" as numbers; None for what is torn, or no row."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row["iteration"], int):
            return None
        return {name: v if isinstance(v, int) else float(v) for name, v in row.items()}
    except (ValueError, KeyError, TypeError):
        return None


def _start(fields: dict[str, Any]) -> Start:
    end = node(fields, "end")
    overrides = fields.get("overrides")
    code = end.get("code")
    return Start(
        argv=[str(each) for each in fields.get("argv") or []],
        overrides=[str(each) for each in overrides] if isinstance(overrides, list) else None,
        folder=str(fields.get("folder") or ""),
        host=str(fields.get("host") or ""),
        time=_seconds(fields.get("time")) or 0.0,
        end=_seconds(end.get("time")),
        code=int(code) if isinstance(code, int) else None,
        why=str(end.get("why") or ""),
        git=node(fields, "git"),
        versions=node(fields, "versions"),
    )


def _seconds(text: Any) -> float | None:
    """Return the seconds since 1970 of a time in ISO's form; None if it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _attempts(path: Path) -> list[Attempt]:
    try:
        return read_attempts(path)
    except (OSError, ValueError, TypeError):  # a line that is just being written
        return []


def _attempt(fields: dict[str, Any]) -> Attempt | None:
    try:
        return Attempt(**fields) if fields else None
    except TypeError:
        return None


def mtime(path: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
