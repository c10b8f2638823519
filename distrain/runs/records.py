"""What the files of a run's folder say, however far the run has come with writing them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from distrain.checkpoint.catalog import find_all
from distrain.checkpoint.format import iteration_of
from distrain.files.regular import open_regular, read_regular, read_tail
from distrain.launch.slurm.attempts import (
    RUNNING_FILE,
    SLURM_FOLDER,
    SUBMITTED_FILE,
    Attempt,
)
from distrain.redact import masked_text
from distrain.run_layout import (
    ATTEMPTS_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    LOGS,
    METRICS_FILE,
    STARTS_FILE,
)
from distrain.runs.frozen_yaml import MAX_BYTES, load_mapping

TAIL_BYTES = 1 << 16
_MAX_JSON_BYTES = 16 << 20
_LARGEST = 2**53  # integers above it are no counts
_LATEST = 1e11  # seconds since 1970
_JOB_ID = re.compile(r"[0-9]{1,20}(_[0-9]{1,20})?")

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
        unreadable: which files cannot be read and why, "" if all can.
    """

    path: Path
    conf: dict[str, Any]
    starts: list[Start]
    rows: list[dict[str, Any]]
    kept_iter: int
    attempts: list[Attempt] = field(default_factory=list)
    running: Attempt | None = None
    submitted_id: str = ""
    unreadable: str = ""

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
        names = [METRICS_FILE, STARTS_FILE, CHECKPOINTS, LOGS, "logs/rank_0.log"]
        names += [SLURM_FOLDER] if self.is_on_slurm else []
        return max(mtime(self.path / name) for name in names)


def read(path: Path) -> Files:
    """Read a run's folder; of metrics.jsonl the end only. What cannot be read is noted.

    Args:
        path: the run folder.
    """
    mistakes: list[str] = []

    def part(name: str, parse: Callable[[Path], Any], default: Any) -> Any:
        try:
            return parse(path)
        except FileNotFoundError:
            return default
        # files of anybody's: what is wrong with one of them must not hide the other runs
        except Exception as error:
            mistakes.append(f"{name}: {_reason(error)}")
            return default

    return Files(
        path=path,
        conf=part(CONFIG_FILE, read_conf, {}),
        starts=part(STARTS_FILE, read_starts, []),
        rows=part(METRICS_FILE, last_rows, []),
        kept_iter=part(CHECKPOINTS, _kept_iter, 0),
        attempts=part(ATTEMPTS_FILE, _attempts, []),
        running=part(RUNNING_FILE, _running, None),
        submitted_id=part(SUBMITTED_FILE, _submitted_id, ""),
        unreadable="; ".join(mistakes),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_conf(path: Path) -> dict[str, Any]:
    """Return the frozen configuration.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none; yaml.YAMLError: no YAML.
    """
    return load_mapping(read_regular(path / CONFIG_FILE, max_bytes=MAX_BYTES))


def node(conf: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a node of a configuration; empty if it is none."""
    found = conf.get(name)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> int:
    """Return a number of a configuration; 0 if it is none."""
    return value if isinstance(value, int) and 0 <= value <= _LARGEST else 0


def read_starts(path: Path) -> list[Start]:
    """Return the starts of a run's command that are noted, oldest first.

    Raises:
        OSError: command.json cannot be read.
        ValueError, KeyError, TypeError: it is damaged.
    """
    starts = _read_json(path / STARTS_FILE)["starts"]
    return [_start(each) for each in _of_type(starts, list, "starts")]


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows in the last 64 KiB of metrics.jsonl, oldest first.

    Raises:
        OSError: it cannot be read.
        ValueError, TypeError: a row is none.
    """
    lines = read_tail(path / METRICS_FILE, max_bytes=TAIL_BYTES).split(b"\n")
    return [row for line in lines if (row := _row(line)) is not None]


def all_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all rows of metrics.jsonl that can be read, oldest first."""
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
    """Return a row, with "NaN" and "Infinity" as numbers; None for what is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "iteration" not in row:
        return None
    iteration = _of_type(row["iteration"], int, "iteration")
    if not 0 <= iteration <= _LARGEST:
        raise ValueError("iteration: expected a count")
    return {name: _value(name, value) for name, value in row.items()}


def _value(name: str, value: Any) -> float:
    if isinstance(value, int) and abs(value) <= _LARGEST:
        return value
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name[:60]}: expected a number") from None


def _of_type(value: Any, kind: type[Any], name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, not {type(value).__name__}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    fields = json.loads(read_regular(path, max_bytes=_MAX_JSON_BYTES))
    return dict(_of_type(fields, dict, "content"))


def _start(fields: Any) -> Start:
    fields = _of_type(fields, dict, "a start")
    end = _of_type(fields.get("end") or {}, dict, "end")
    overrides, code = fields.get("overrides"), end.get("code")
    versions = _of_type(fields.get("versions") or {}, dict, "versions")
    git = dict(_of_type(fields.get("git") or {}, dict, "git"))
    for name in ("commit", "diff"):
        _of_type(git.get(name, ""), str, f"git.{name}")
    return Start(
        argv=_texts(fields.get("argv") or [], "argv"),
        overrides=None if overrides is None else _texts(overrides, "overrides"),
        folder=_of_type(fields.get("folder") or "", str, "folder"),
        host=_of_type(fields.get("host") or "", str, "host"),
        time=_seconds(fields.get("time")) or 0.0,
        end=_seconds(end.get("time")),
        code=None if code is None else _of_type(code, int, "end.code"),
        why=masked_text(_of_type(end.get("why") or "", str, "end.why")),
        git=git,
        versions={name: _of_type(each, str, f"versions.{name}") for name, each in versions.items()},
    )


def _texts(values: Any, name: str) -> list[str]:
    return [_of_type(each, str, name) for each in _of_type(values, list, name)]


def _seconds(text: Any) -> float | None:
    """Return the seconds since 1970 of a time in ISO's form; None if there is none."""
    if text is None:
        return None
    seconds = datetime.fromisoformat(_of_type(text, str, "time")).timestamp()
    if not 0 <= seconds <= _LATEST:
        raise ValueError(f"time: {text[:40]} is none of a run")
    return seconds


def _kept_iter(path: Path) -> int:
    found = find_all(path / CHECKPOINTS)
    return iteration_of(found[-1].name) or 0 if found else 0


def _attempts(path: Path) -> list[Attempt]:
    data = read_regular(path / ATTEMPTS_FILE, max_bytes=_MAX_JSON_BYTES)
    lines = data.split(b"\n")[:-1]  # the last may be just being written
    return [_attempt(json.loads(line)) for line in lines if line.strip()]


def _running(path: Path) -> Attempt | None:
    fields = _read_json(path / SLURM_FOLDER / RUNNING_FILE)
    return _attempt(fields) if fields else None


def _attempt(fields: Any) -> Attempt:
    attempt = Attempt(**_of_type(fields, dict, "an attempt"))
    kinds = {"str": str, "bool": bool, "int": int, "float": float}
    for each in dataclasses.fields(Attempt):
        value = getattr(attempt, each.name)
        if each.type == "list[str]":
            _texts(value, each.name)
        elif each.type in ("int", "float"):
            _of_type(float(value) if each.type == "float" else value, kinds[each.type], each.name)
            if not 0 <= value <= _LARGEST:
                raise ValueError(f"{each.name}: expected a number, 0 or more")
        else:
            _of_type(value, kinds[str(each.type)], each.name)
    return dataclasses.replace(attempt, why=masked_text(attempt.why))


def _submitted_id(path: Path) -> str:
    job_id = str(_read_json(path / SLURM_FOLDER / SUBMITTED_FILE).get("job_id") or "")
    if job_id and not _JOB_ID.fullmatch(job_id):  # it becomes an argument of squeue
        raise ValueError(f"job_id: expected a number, not {job_id[:40]}")
    return job_id


def mtime(path: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
