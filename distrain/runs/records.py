"""Files of a run folder, read at any state of the run and from any author."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from distrain.files.open_regular import open_regular, read_regular, read_tail
from distrain.launch import Launcher
from distrain.launch.client import JobClient
from distrain.redact import masked_text
from distrain.run_layout import (
    ATTEMPTS_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    LOGS,
    METRICS_FILE,
    STARTS_FILE,
)
from distrain.runfolder.allowed_changes import change_lines
from distrain.runfolder.attempts import (
    JOB_FOLDER,
    RUNNING_FILE,
    SUBMITTED_FILE,
    Attempt,
    kept,
    of_type,
    read_attempts,
    read_job_id,
    read_running,
)
from distrain.runfolder.epoch_file import num_iterations
from distrain.runs.frozen_yaml import MAX_BYTES, load_mapping

TAIL_BYTES = 1 << 16
_MAX_JSON_BYTES = 16 << 20
_MAX_COUNT = 2**53  # larger integers are not counts
_MAX_TIME_S = 1e11  # since 1970


@dataclass(frozen=True)
class Start:
    """One start of a run's command, from command.json."""

    argv: list[str]  # arguments of the command
    overrides: list[str] | None  # of this run; None if not recorded
    folder: str  # in which the command was given
    host: str  # name of the machine
    time: float  # seconds since 1970
    end: float | None  # seconds since 1970; None if no end was recorded
    code: int | None  # exit code; None likewise
    why: str  # one line about a failure
    # the repository's `commit`, whether it was `changed`, the file of the `diff`
    git: dict[str, Any]
    versions: dict[str, str]  # of packages
    changes: list[str] = field(default_factory=list)  # a line per key changed at this start


@dataclass(frozen=True)
class Files:
    """Content of a run folder."""

    path: Path  # the folder
    conf: dict[str, Any]  # frozen configuration; empty if unreadable
    starts: list[Start]  # of the command
    rows: list[dict[str, Any]]  # last rows of metrics.jsonl
    kept_iter: int  # iterations in the newest checkpoint, by its name; 0 without one
    attempts: list[Attempt] = field(default_factory=list)  # ended attempts of its jobs
    running: Attempt | None = None  # the attempt in progress
    job_id: str = ""  # of the job that was submitted last, "" without one
    unreadable: str = ""  # names of unreadable files with reasons, "" if all can be read

    @property
    def max_iter(self) -> int:
        """Iterations that the run is to have; 0 if unknown."""
        max_iter = node(self.conf, "trainer").get("max_iter")
        return number(num_iterations(self.path, max_iter))

    @property
    def iteration(self) -> int:
        """Iterations done, by metrics.jsonl and the checkpoints."""
        return max(int(self.rows[-1]["iteration"]) + 1 if self.rows else 0, self.kept_iter)

    @property
    def has_ended(self) -> bool:
        """Whether the end of the last start is recorded, and no attempt of a job is in progress."""
        return self.running is None and bool(self.starts) and self.starts[-1].code is not None

    @property
    def launcher(self) -> type[Launcher] | None:
        """Class of the launcher of the last start; None if unknown here."""
        target = str(
            node(self.conf, "launch").get("_target_", "distrain.launch.local.LocalLauncher")
        )
        # the import runs code: of distrain, or of a path that the user of this command wrote
        is_own = target.startswith("distrain.") or _owner(self.path / CONFIG_FILE) == os.getuid()
        return _launcher(target) if is_own else None

    @property
    def client(self) -> type[JobClient] | None:
        """Client of the launcher's jobs; None without jobs."""
        return self.launcher.client if self.launcher is not None else None

    def last_write_s(self) -> float:
        """Return when the run last wrote a file, in seconds since 1970."""
        names = (METRICS_FILE, STARTS_FILE, CHECKPOINTS, LOGS, f"{LOGS}/rank_0.log", JOB_FOLDER)
        return max(mtime(self.path / name) for name in names)


@functools.cache
def _launcher(target: str) -> type[Launcher] | None:
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit):  # a module of another environment
        return None
    return found if isinstance(found, type) and issubclass(found, Launcher) else None


def _owner(path: Path) -> int:
    try:
        return path.stat().st_uid
    except OSError:
        return -1


def read(path: Path) -> Files:
    """Read a run folder, of metrics.jsonl the end only; unreadable files are noted."""
    mistakes: list[str] = []

    def part(name: str, parse: Callable[[Path], Any], default: Any) -> Any:
        try:
            return parse(path)
        except FileNotFoundError:
            return default
        # files of any author: an error in one of them must not hide the other runs
        except Exception as error:
            mistakes.append(f"{name}: {_reason(error)}")
            return default

    return Files(
        path=path,
        conf=part(CONFIG_FILE, _conf, {}),
        starts=part(STARTS_FILE, read_starts, []),
        rows=part(METRICS_FILE, last_rows, []),
        kept_iter=part(CHECKPOINTS, kept, 0),
        attempts=part(ATTEMPTS_FILE, _attempts, []),
        running=part(RUNNING_FILE, read_running, None),
        job_id=part(SUBMITTED_FILE, read_job_id, ""),
        unreadable="; ".join(mistakes),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = error.strerror if isinstance(error, OSError) else str(error)
    return ((text or "").splitlines() or [type(error).__name__])[0][:200]


def node(conf: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a node of a configuration; {} if it is not a mapping."""
    found = conf.get(name)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> int:
    """Return a count of a configuration; 0 if it is not one."""
    return value if isinstance(value, int) and 0 <= value <= _MAX_COUNT else 0


def read_starts(path: Path) -> list[Start]:
    """Return the recorded starts of a run's command, oldest first; raises if it is damaged."""
    data = json.loads(read_regular(path / STARTS_FILE, max_bytes=_MAX_JSON_BYTES))
    starts = of_type(data, dict, "content")["starts"]
    return [_start(each) for each in of_type(starts, list, "starts")]


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows in the last 64 KiB of metrics.jsonl, oldest first; raises if damaged."""
    lines = read_tail(path / METRICS_FILE, max_bytes=TAIL_BYTES).split(b"\n")
    return [row for line in lines if (row := _row(line)) is not None]


def all_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all readable rows of metrics.jsonl, oldest first."""
    try:
        with open(open_regular(path / METRICS_FILE), "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, RecursionError):
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
    """Return a row, with "NaN" and "Infinity" as numbers; None for an incomplete line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "iteration" not in row:
        return None
    if not 0 <= of_type(row["iteration"], int, "iteration") <= _MAX_COUNT:
        raise ValueError("iteration: expected a count")
    return {name: _value(name, value) for name, value in row.items()}


def _value(name: str, value: Any) -> float:
    if isinstance(value, int) and abs(value) <= _MAX_COUNT:
        return value
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name[:60]}: expected a number") from None


def _start(fields: Any) -> Start:
    fields = of_type(fields, dict, "a start")
    end = of_type(fields.get("end") or {}, dict, "end")
    overrides, code = fields.get("overrides"), end.get("code")
    versions = of_type(fields.get("versions") or {}, dict, "versions")
    git = dict(of_type(fields.get("git") or {}, dict, "git"))
    for name in ("commit", "diff"):
        of_type(git.get(name, ""), str, f"git.{name}")
    return Start(
        argv=_texts(fields.get("argv") or [], "argv"),
        overrides=None if overrides is None else _texts(overrides, "overrides"),
        folder=of_type(fields.get("folder") or "", str, "folder"),
        host=of_type(fields.get("host") or "", str, "host"),
        time=_seconds(fields.get("time")) or 0.0,
        end=_seconds(end.get("time")),
        code=None if code is None else of_type(code, int, "end.code"),
        why=masked_text(of_type(end.get("why") or "", str, "end.why")),
        git=git,
        versions={name: of_type(each, str, f"versions.{name}") for name, each in versions.items()},
        changes=change_lines(fields),
    )


def _texts(values: Any, name: str) -> list[str]:
    return [of_type(each, str, name) for each in of_type(values, list, name)]


def _seconds(text: Any) -> float | None:
    """Return the seconds since 1970 of an ISO time; None for None."""
    if text is None:
        return None
    seconds = datetime.fromisoformat(of_type(text, str, "time")).timestamp()
    if not 0 <= seconds <= _MAX_TIME_S:
        raise ValueError(f"time: expected one after 1970, not {text[:40]}")
    return seconds


def _conf(path: Path) -> dict[str, Any]:
    return load_mapping(read_regular(path / CONFIG_FILE, max_bytes=MAX_BYTES))


def _attempts(path: Path) -> list[Attempt]:
    return [dataclasses.replace(a, why=masked_text(a.why)) for a in read_attempts(path)]


def mtime(path: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
