"""Snapshot of the git work tree at submission, for the job and its requeues."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from distrain.errors import ConfigError

FOLDER = "submitted_code"


def take(target: Path) -> None:
    """Copy the repository around the current folder.

    Copied are tracked files, edits included, and Python files that git neither tracks nor ignores;
    packages installed from elsewhere are not. An older copy is replaced.

    Raises:
        ConfigError: the current folder is in no git repository.
    """
    root = _root()
    tracked = _git(root, "ls-files", "-z")
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py")
    shutil.rmtree(target, ignore_errors=True)
    for name in sorted({*tracked.split("\0"), *new.split("\0")} - {""}):
        path = root / name
        is_file = path.is_symlink() or path.is_file()  # not a submodule, not deleted
        if is_file and FOLDER not in path.parts:  # not the copy of another run
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy, follow_symlinks=False)


def python_path(target: Path) -> list[str]:
    """Return the entries of PYTHONPATH that make python import the copy.

    These are the current folder and those of PYTHONPATH, replaced by their copies if they lie in
    the repository.
    """
    root = _root()
    paths = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return list(dict.fromkeys(_in_copy(path, root, target) for path in paths if path))


def _root() -> Path:
    """Return the folder of the repository around the current folder."""
    return Path(_git(Path.cwd(), "rev-parse", "--show-toplevel").strip())


def _in_copy(path: str, root: Path, target: Path) -> str:
    """Return the path's counterpart in the copy; the path itself if it is not in the repository."""
    whole = Path(path).resolve()
    return str(target / whole.relative_to(root)) if whole.is_relative_to(root) else path


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        raise ConfigError(
            f"launch.snapshot=true copies the files that git tracks, but in {folder}: "
            f"{reason.strip()}; run it in a repository, or with launch.snapshot=false"
        ) from error
