"""Finding runs below a folder, and the one that a user means."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from distrain.errors import ConfigError
from distrain.run_layout import CHECKPOINTS, CONFIG_FILE, LOGS, TENSORBOARD

_INSIDE = {CHECKPOINTS, LOGS, "slurm", TENSORBOARD}  # folders without runs in them


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
        return  # not ours to read, or just removed
    is_run = any(entry.name == CONFIG_FILE for entry in found)
    if is_run:
        yield folder
    for entry in found:
        is_inside = entry.name.startswith(".") or (is_run and entry.name in _INSIDE)
        if not is_inside and entry.is_dir(follow_symlinks=False):
            yield from _runs(Path(entry.path))


def name_of(path: Path, folder: Path) -> str:
    """Return the name that a run below a folder goes by."""
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    return path.absolute().name if name == "." else name


def the_run(name: str, folder: Path) -> Path:
    """Return the folder of the run that a user means.

    Args:
        name: a path, or a run's name below `folder`.
        folder: where the runs are.

    Raises:
        ConfigError: there is none; the text names those that are spelled like it.
    """
    for path in (Path(name), folder / name):
        if os.path.lexists(path / CONFIG_FILE):
            return path
    names = [name_of(path, folder) for path in find_runs(folder)] if folder.is_dir() else []
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    near = near or [each for each in names if name in each][:3]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif names:
        hint = f"available: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
    else:
        hint = f"no runs are in {folder}; --folder names another one"
    raise ConfigError(f"{name}: no such run; {hint}")
