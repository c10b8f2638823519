"""The folder of a run: who may use it, and what was frozen into it at the start.

::

    run.yaml       the resolved configuration, secrets masked; its `_target_`s are code
    command.json   each start: the command, the versions, the commit, the keys that were changed,
                   and how it ended
    git.diff       what differed from that commit
    lock           held by the process that runs the ranks, and by them
    logs/ checkpoints/ tensorboard/ metrics.jsonl      written by the ranks
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from distrain.checkpoint.catalog import find_all, newest_valid
from distrain.checkpoint.format import MODEL_PART, iteration_of
from distrain.checkpoint.retention import read_run_id
from distrain.checks import refuse_url, shown
from distrain.config import schema
from distrain.errors import ConfigError, ExitCode, RunFailed
from distrain.files import atomic
from distrain.files.retry import retried, unreadable
from distrain.redact import masked, masked_overrides, masked_text, secrets_of
from distrain.run_layout import CHECKPOINTS, CONFIG_FILE, LOCK_FILE, STARTS_FILE
from distrain.runfolder import lock
from distrain.runfolder.differences import covers, differences, is_data_path
from distrain.runfolder.files import cannot_use, read_bytes, read_frozen, read_starts
from distrain.runfolder.provenance import git_state, start_record

FREE_KEYS = (
    *("launch", "resume", "plan", "run", "vars", "checkpoint", "data.workers"),
    *("trainer.strategy", "trainer.fsdp"),  # where the state lies; sums may round differently
)
"""Keys that may change between two starts of a run: they do not change what is computed."""

HORIZON_KEYS = ("trainer.max_iter", "schedule.max_iters")
"""Keys that may change too: a run may be made longer."""

_MODE = 0o600  # diffs and arguments may hold what other users must not read


class RunFolder:
    """A run's folder, held by this process until the end of the `with`.

    Attributes:
        path: absolute.
        is_new: whether this start has made it.
        done_iter: iterations of the newest valid checkpoint, if they are all that was asked for.
        notices: what the user should be told.
    """

    def __init__(self, run_dir: str | Path) -> None:
        refuse_url("run.dir", run_dir)
        self.path = Path(run_dir).absolute()
        self.is_new = False
        self.done_iter: int | None = None
        self.notices: list[str] = []
        self._made: list[Path] = []
        self._others: set[str] = set()
        self._before: dict[Path, bytes | None] = {}
        self._secrets: set[str] = set()  # of the configuration: not to be written
        self._lock = -1

    def __enter__(self) -> RunFolder:
        try:
            self._made = _make(self.path)
            had_lock = (self.path / LOCK_FILE).exists()
            self._lock = lock.hold(self.path)
            self._others = set(os.listdir(self.path)) - (set() if had_lock else {LOCK_FILE})
        except OSError as error:
            self._remove_made()
            raise cannot_use(self.path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, ConfigError):
            self._undo()
        os.close(self._lock)

    def freeze(
        self,
        conf: Mapping[str, Any],
        argv: Sequence[str],
        *,
        overrides: Sequence[str] | None = None,
        is_restart: bool = False,
    ) -> None:
        """Write down what this start is about to do, if the folder is right for it.

        Args:
            conf: the resolved configuration.
            argv: the command's arguments.
            overrides: those of this very run, of a sweep; None: the arguments.
            is_restart: another program has started the run again by itself.

        Raises:
            ConfigError: the folder holds something else; nothing was written then.
            RunFailed: what it holds cannot be read; nothing was written then.
        """
        frozen = read_frozen(self.path / CONFIG_FILE)
        changed: dict[str, list[Any]] = {}
        try:
            if frozen is None:
                self._check_new(conf)
                self.is_new = True
            else:
                self._check_used(conf, is_restart=is_restart)
                changed = self._check_same(conf, frozen)
                self.done_iter = _done_iter(self.path, conf["trainer"]["max_iter"])
        except OSError as error:
            raise RunFailed(unreadable(self.path, error)) from error
        if self.done_iter is not None:
            return
        starts = self._earlier_starts()
        if self.is_new or changed:
            head = "# What this run trains, resolved. Its _target_s are code.\n"
            self._write(CONFIG_FILE, head + yaml.safe_dump(masked(conf), sort_keys=False))
        git = git_state(os.getcwd())
        record = start_record(masked_overrides(argv), git) | {"changed": changed}
        record["overrides"] = masked_overrides(argv if overrides is None else overrides)
        self._secrets = secrets_of(argv, conf)
        if git is not None and git.diff:
            name = "git.diff" if not starts else f"git-{len(starts)}.diff"
            self._write(name, git.diff)
            record["git"]["diff"] = name
        self._write(STARTS_FILE, json.dumps({"starts": [*starts, record]}, indent=1) + "\n")

    def _earlier_starts(self) -> list[Any]:
        """Return the starts in command.json; a damaged one is kept under another name."""
        file = self.path / STARTS_FILE
        if (starts := read_starts(file)) is None:
            aside = file.rename(file.with_name(f"command-damaged-{os.urandom(3).hex()}.json"))
            self.notices.append(f"{file} is damaged and begins again; it is now {aside.name}")
        return starts or []

    def watch(self, start: Callable[[], ExitCode]) -> ExitCode:
        """Return what `start` returns, which runs the ranks; note in command.json how it ended."""
        try:
            code = start()
        except BaseException as error:
            is_mistake = isinstance(error, ConfigError)
            lines = str(error).splitlines() or [type(error).__name__]
            self._note_end(ExitCode.BAD_CONFIG if is_mistake else ExitCode.FAILED, lines[0])
            raise
        self._note_end(code)
        return code

    def _note_end(self, code: ExitCode, why: str = "") -> None:
        file = self.path / STARTS_FILE
        now, why = datetime.now(UTC).isoformat("T", "seconds"), masked_text(why, self._secrets)
        try:
            starts = read_starts(file)
            if starts:
                starts[-1]["end"] = {"time": now, "code": int(code), "why": why}
                text = json.dumps({"starts": starts}, indent=1) + "\n"
                retried(lambda: atomic.write(file, text.encode(), mode=_MODE))
        except (OSError, RunFailed) as error:  # must not hide how the run ended
            print(f"distrain: {file}: the end of the run is not noted: {error}", file=sys.stderr)

    def _check_new(self, conf: Mapping[str, Any]) -> None:
        """Check that a folder without a run is empty, and may be new."""
        others = sorted(n for n in os.listdir(self.path) if n != LOCK_FILE and n[0] != ".")
        if others:
            raise ConfigError(
                f"run.dir={self.path}: this folder holds no run, but {', '.join(others[:3])}; "
                "give a new one"
            )
        if conf["resume"] == "must":
            raise ConfigError(f"resume=must: {self.path} holds no run; resume=auto begins one")

    def _check_used(self, conf: Mapping[str, Any], *, is_restart: bool) -> None:
        """Check that a run may be continued."""
        if conf["resume"] == "never" and not is_restart:
            raise ConfigError(
                f"resume=never: {self.path} holds a run; give another run.name, or resume=auto to "
                "continue it"
            )
        if conf["resume"] == "must" and not find_all(self.path / CHECKPOINTS, with_trained=True):
            raise ConfigError(
                f"resume=must: {self.path} holds no checkpoint; resume=auto begins anew"
            )

    def _check_same(
        self, conf: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> dict[str, list[Any]]:
        """Return the keys that differ from the frozen ones, each with its old and new value.

        Raises:
            ConfigError: one of them may not.
        """
        changed = differences(_with_defaults(masked(frozen)), masked(conf))
        moved = {key for key, values in changed.items() if is_data_path(key, *values)}
        allowed = (*FREE_KEYS, *HORIZON_KEYS, *moved)
        refused = {k: v for k, v in changed.items() if not covers(allowed, k)}
        if refused:
            lines = [
                f"{key}: {shown(old, most=40)} -> {shown(new, most=40)}"
                for key, (old, new) in refused.items()
            ]
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ConfigError(
                f"{self.path} holds a run of another configuration ({', '.join(lines[:5])}{more}); "
                "give another run.name, or the old values to continue it"
            )
        for key, (old, new) in changed.items():
            if key in HORIZON_KEYS or key in moved:
                self.notices.append(f"{key}: {old} -> {new} from here on")
        return {key: list(values) for key, values in changed.items()}

    def _write(self, name: str, text: str) -> None:
        """Write a file whole, and remember what was there.

        Raises:
            ConfigError: the folder does not take it: a full disk, a quota.
            RunFailed: the storage fails.
        """
        path = self.path / name
        try:
            self._before.setdefault(path, read_bytes(path))
            retried(lambda: atomic.write(path, text.encode(), mode=_MODE))
        except OSError as error:
            raise cannot_use(self.path, error, f"{name} cannot be written: ") from error

    def _undo(self) -> None:
        """Leave the folder as this start has found it, unless a checkpoint came of it."""
        try:
            self._restore()
        except OSError as error:  # the mistake itself is what the user must see
            print(f"distrain: {self.path} is not as it was before: {error}", file=sys.stderr)

    def _restore(self) -> None:
        if CONFIG_FILE in self._others:
            for path, content in self._before.items():
                if content is None:
                    path.unlink(missing_ok=True)
                elif read_bytes(path) != content:  # in place, a full disk would empty it
                    atomic.write(path, content, mode=_MODE)
            return
        if find_all(self.path / CHECKPOINTS, with_trained=True):
            return
        for path in self.path.iterdir():
            if path.name in self._others:
                continue  # it was there before: not ours
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._remove_made()

    def _remove_made(self) -> None:
        """Remove the folders that this start has made."""
        for path in reversed(self._made):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def await_run(run_dir: str | Path, *, timeout_s: float = 600.0) -> None:
    """Wait until another process has frozen the run.

    Args:
        run_dir: the run folder.
        timeout_s: network file systems may be half a minute late.

    Raises:
        ConfigError: there is still none.
    """
    deadline = time.monotonic() + timeout_s
    while not Path(run_dir, CONFIG_FILE).exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"run.dir={run_dir}: rank 0 has made no run in {timeout_s:g} s")
        time.sleep(0.1)


def _with_defaults(frozen: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a frozen configuration with the keys that did not exist yet when it was written."""
    with contextlib.suppress(ConfigError):  # it has keys that exist no more: these are told
        return schema.check(dict(frozen))
    return frozen


def _done_iter(path: Path, max_iter: int) -> int | None:
    """Return the iterations of the newest valid checkpoint if nothing is left to do.

    ConfigError if it has more than are asked for.
    """
    checkpoints = path / CHECKPOINTS
    # names are enough to know that something is left; contents are read only if nothing is
    found = retried(lambda: find_all(checkpoints))
    if not found or (iteration_of(found[-1].name) or 0) < max_iter:
        return None
    newest = newest_valid(checkpoints)
    if newest is None or newest.is_end_left:
        return None
    # one of another run, or without a model, is for the ranks to pass over
    if newest is None or newest.iteration < max_iter or MODEL_PART not in newest.digests:
        return None
    if read_run_id(str(checkpoints)) not in (None, newest.run_id):
        return None
    if newest.iteration > max_iter:
        done = (
            f"trainer.max_iter={max_iter}: the run has done {newest.iteration} iterations already"
        )
        raise ConfigError(f"{done}; expected more than {newest.iteration} to go on")
    return newest.iteration


def _make(path: Path) -> list[Path]:
    """Make a folder; return the folders that were not there, outermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
