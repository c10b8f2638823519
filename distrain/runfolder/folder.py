"""RunFolder: claim the folder of a run, freeze its configuration, record its starts.

::

    run.yaml       resolved configuration, secrets masked; its `_target_`s are code
    command.json   each start: command, versions, commit, changed keys, end
    git.diff       difference from that commit
    lock           held by the process that starts the ranks, and by the ranks
    logs/ checkpoints/ metrics.jsonl events.out.*      written by the ranks
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from distrain.checkpoint.catalog import find_all, newest_valid
from distrain.checkpoint.format import MODEL_PART, iteration_of
from distrain.checkpoint.mirror_status import read_status
from distrain.checkpoint.mirror_url import mirror_of
from distrain.checks import refuse_url
from distrain.errors import ConfigError, ExitCode, RunFailed, StoppedBeforeStart
from distrain.files import atomic
from distrain.files.retry import retried, unreadable
from distrain.redact import masked, masked_overrides, masked_text, secrets_of
from distrain.run_layout import CHECKPOINTS, CONFIG_FILE, LOCK_FILE, STARTS_FILE
from distrain.runfolder import lock
from distrain.runfolder.allowed_changes import changed_keys, check_changes, check_permissions
from distrain.runfolder.attempts import kept
from distrain.runfolder.epoch_file import num_iterations
from distrain.runfolder.files import cannot_use, read_bytes, read_frozen, read_starts
from distrain.runfolder.provenance import git_state, start_record

_MODE = 0o600  # diffs and arguments may hold secrets


class RunFolder:
    """Folder of a run, locked by this process until the end of the `with`.

    Attributes:
        path: absolute.
        is_new: whether this start created the run.
        done_iter: iterations of the newest valid checkpoint, if no iteration is left.
        notices: messages for the user.
    """

    def __init__(self, run_dir: str | Path) -> None:
        refuse_url("run.dir", run_dir)
        self.path = Path(run_dir).absolute()
        self.is_new = False
        self.done_iter: int | None = None
        self.notices: list[str] = []
        self._created: list[Path] = []  # folders
        self._others: set[str] = set()  # names of files that were there before
        self._before: dict[Path, bytes | None] = {}  # earlier contents of overwritten files
        self._secrets: set[str] = set()
        self._lock = -1

    def __enter__(self) -> RunFolder:
        try:
            self._created = _create(self.path)
            had_lock = (self.path / LOCK_FILE).exists()
            self._lock = lock.hold(self.path)
            self._others = set(os.listdir(self.path)) - (set() if had_lock else {LOCK_FILE})
        except OSError as error:
            with contextlib.suppress(OSError):  # must not hide the first one
                self._remove_created()
            if self._lock >= 0:
                os.close(self._lock)
            raise cannot_use(self.path, error) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConfigError | StoppedBeforeStart):
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
        """Check that the folder fits this start, then write run.yaml, command.json and git.diff.

        Args:
            conf: resolved configuration.
            argv: arguments of the command.
            overrides: those of this run in a sweep; None for `argv`.
            is_restart: a cluster restarted the run, not the user.

        Raises:
            ConfigError: the folder does not fit; nothing was written.
            RunFailed: its files cannot be read; nothing was written.
        """
        frozen = read_frozen(self.path / CONFIG_FILE)
        changed: dict[str, list[Any]] = {}
        kept_iter = 0
        check_permissions(conf, frozen)
        try:
            if frozen is None:
                self._check_new(conf)
                self.is_new = True
            else:
                self._check_used(conf, is_restart=is_restart)
                changed = changed_keys(frozen, conf)
                allowed = conf.get("allow_changes", ())
                self.notices += check_changes(f"run.dir={self.path}", changed, allowed)
                kept_iter = kept(self.path)
                if not _has_uploads_left(self.path, mirror_of(conf)):
                    self.done_iter = _done_iter(self.path, conf["trainer"]["max_iter"], changed)
        except OSError as error:
            raise RunFailed(unreadable(self.path, error)) from error
        if self.done_iter is not None:
            return
        starts = self._earlier_starts()
        if self.is_new or changed:
            head = "# Resolved configuration of this run. Its _target_s are code.\n"
            self._write(CONFIG_FILE, head + yaml.safe_dump(masked(conf), sort_keys=False))
        git, diff = git_state(os.getcwd())
        record = start_record(masked_overrides(argv), git) | {"changed": changed}
        record["iteration"] = kept_iter
        record["overrides"] = masked_overrides(argv if overrides is None else overrides)
        self._secrets = secrets_of(argv, conf)
        if diff:
            name = "git.diff" if not starts else f"git-{len(starts)}.diff"
            self._write(name, diff)
            record["git"]["diff"] = name
        self._write(STARTS_FILE, _rendered([*starts, record]))

    def _earlier_starts(self) -> list[Any]:
        """Return the starts in command.json; rename a damaged one."""
        file = self.path / STARTS_FILE
        if (starts := read_starts(file)) is None:
            aside = file.rename(file.with_name(f"command-damaged-{os.urandom(3).hex()}.json"))
            self.notices.append(f"{file} is damaged and was renamed to {aside.name}")
        return starts or []

    def watch(self, start: Callable[[], ExitCode]) -> ExitCode:
        """Return `start()`, which runs the ranks; record its end in command.json."""
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
        now, why = (
            datetime.now(timezone.utc).isoformat("T", "seconds"),
            masked_text(why, self._secrets),
        )
        try:
            starts = read_starts(file)
            if starts:
                starts[-1]["end"] = {"time": now, "code": int(code), "why": why}
                data = _rendered(starts).encode()
                retried(lambda: atomic.write(file, data, mode=_MODE))
        except (OSError, RunFailed) as error:  # must not hide how the run ended
            print(f"distrain: {file}: the end of the run was not written: {error}", file=sys.stderr)

    def _check_new(self, conf: Mapping[str, Any]) -> None:
        """Check that a folder without a run is empty, and that `resume` allows a new run."""
        others = sorted(n for n in os.listdir(self.path) if n != LOCK_FILE and n[0] != ".")
        if others:
            raise ConfigError(
                f"run.dir={self.path}: this folder holds no run, but {', '.join(others[:3])}; "
                "give another one"
            )
        if conf["resume"] == "must" and not mirror_of(conf):  # else the ranks look
            raise ConfigError(f"resume=must: {self.path} holds no run; resume=auto starts one")

    def _check_used(self, conf: Mapping[str, Any], *, is_restart: bool) -> None:
        """Check that `resume` allows to continue the run."""
        if conf["resume"] == "never" and not is_restart:
            raise ConfigError(
                f"resume=never: {self.path} holds a run; give another run.name, or resume=auto to "
                "continue it"
            )
        is_needed = conf["resume"] == "must" and not mirror_of(conf)
        if is_needed and not find_all(self.path / CHECKPOINTS, with_trained=True):
            raise ConfigError(
                f"resume=must: {self.path} holds no checkpoint; resume=auto starts at iteration 0"
            )

    def _write(self, name: str, text: str) -> None:
        """Write a file, and keep its earlier content for `_undo`.

        Raises:
            ConfigError: full disk, quota, permissions.
            RunFailed: the storage fails.
        """
        path = self.path / name
        try:
            self._before.setdefault(path, read_bytes(path))
            retried(lambda: atomic.write(path, text.encode(), mode=_MODE))
        except OSError as error:
            raise cannot_use(self.path, error, f"{name} cannot be written: ") from error

    def _undo(self) -> None:
        """Restore the folder as it was, unless this start saved a checkpoint."""
        try:
            self._restore()
        except OSError as error:  # must not hide the mistake
            print(f"distrain: {self.path} could not be restored: {error}", file=sys.stderr)

    def _restore(self) -> None:
        if CONFIG_FILE in self._others:
            for path, content in self._before.items():
                if content is None:
                    path.unlink(missing_ok=True)
                elif read_bytes(path) != content:
                    atomic.write(path, content, mode=_MODE)
            return
        if find_all(self.path / CHECKPOINTS, with_trained=True):
            return
        # the lock last: to others the run is active until nothing of it is left
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == LOCK_FILE):
            if path.name in self._others:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._remove_created()

    def _remove_created(self) -> None:
        for path in reversed(self._created):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def await_run(run_dir: str | Path, *, timeout_s: float = 600.0) -> None:
    """Wait until another process has written run.yaml; ConfigError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not Path(run_dir, CONFIG_FILE).exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"run.dir={run_dir}: rank 0 started no run within {timeout_s:g} s")
        time.sleep(0.1)


def _has_uploads_left(path: Path, mirror: str | None) -> bool:
    """Return whether checkpoints of the run may be missing in its mirror: the ranks upload them."""
    if mirror is None:
        return False
    status = read_status(path)
    if status is None or status.url != mirror or status.is_behind or status.newest is None:
        return True
    # that of an earlier start, where this one did not reach the store
    found = retried(lambda: find_all(path / CHECKPOINTS))
    return bool(found) and (iteration_of(found[-1].name) or 0) > status.newest


def _done_iter(path: Path, length: int | str, changed: Mapping[str, Any]) -> int | None:
    """Return the iterations of the newest valid checkpoint if no iteration is left.

    None also where they are not known: in epochs, of data that may have another length now. The
    ranks find out.

    Raises:
        ConfigError: it has more than `max_iter`.
    """
    max_iter = num_iterations(path, length)
    is_other = isinstance(length, str) and any(key.startswith("data.") for key in changed)
    if max_iter is None or is_other:
        return None
    checkpoints = path / CHECKPOINTS
    # most starts end here: names are enough to know that iterations are left
    found = retried(lambda: find_all(checkpoints))
    if not found or (iteration_of(found[-1].name) or 0) < max_iter:
        return None
    newest = newest_valid(checkpoints)
    if newest is None or newest.is_end_left or newest.iteration < max_iter:
        return None
    if MODEL_PART not in newest.digests:  # the ranks skip it
        return None
    if newest.iteration > max_iter:
        raise ConfigError(
            f"trainer.max_iter={max_iter}: expected more than {newest.iteration}, the iterations "
            "that are done"
        )
    return newest.iteration


def _rendered(starts: Sequence[Any]) -> str:
    """Return the text of command.json."""
    return json.dumps({"starts": starts}, indent=1) + "\n"


def _create(path: Path) -> list[Path]:
    """Create a folder with its parents; return those created, outermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
