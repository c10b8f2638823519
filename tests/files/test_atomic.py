"""A file has the old content or the new, never a part of it."""

import errno
import os
from pathlib import Path

import pytest

from distrain.files.atomic import replacing, sync_folder, write


def test_a_file_is_replaced(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        write(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


def test_permissions(tmp_path: Path) -> None:
    write(tmp_path / "file", b"", mode=0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("file", b"one")
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", b"one")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "file", b"two")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as scratch:
        Path(scratch).touch()
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]
    write(tmp_path / "file", b"two", sync=False)
    assert (tmp_path / "file").read_bytes() == b"two"


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_systems_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raises:
        with pytest.raises(OSError):
            sync_folder(str(tmp_path))
    else:
        sync_folder(str(tmp_path))
