"""Find the runs below a folder, and the run that a user names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.run_layout import CHECKPOINTS, CONFIG_FILE, LOGS
from distrain.runfolder.attempts import JOB_FOLDER

_NO_RUNS_IN = {CHECKPOINTS, LOGS, JOB_FOLDER}  # folders of a run


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders below a folder, itself included, by name.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the one that holds the runs")
    return sorted(_runs(folder))


def _runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders, those of a sweep inside another run's folder too."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError:
        return  # no permission, or just removed
    is_run = any(entry.name == CONFIG_FILE for entry in found)
    if is_run:
        yield folder
    for entry in found:
        is_skipped = entry.name.startswith(".") or (is_run and entry.name in _NO_RUNS_IN)
        if not is_skipped and entry.is_dir(follow_symlinks=False):
            yield from _runs(Path(entry.path))


def name_of(path: Path, folder: Path) -> str:
    """Return the name of a run below a folder."""
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    return path.absolute().name if name == "." else name


def resolve_run(name: str, folder: Path) -> Path:
    """Return the folder of a run, given as a path or as a name below `folder`.

    Raises:
        ConfigError: there is none; the text names similar ones.
    """
    for path in (Path(name), folder / name):
        if os.path.lexists(path / CONFIG_FILE):
            return path
    names = [name_of(path, folder) for path in find_runs(folder)] if folder.is_dir() else []
    containing = [each for each in names if name in each][:3]
    hint = f"no runs are in {folder}; --folder names another one"
    if names:
        hint = did_you_mean(name, names)
    if hint.startswith("available: ") and containing:
        hint = f"did you mean {' or '.join(containing)}?"
    raise ConfigError(f"{name}: no such run; {hint}")
