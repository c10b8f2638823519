"""Small files appear whole or not at all; the lock tells the living from the dead."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from distrain.files import atomic as durable


def test_names() -> None:
    one, two = durable.scratch_name("best.json"), durable.scratch_name("best.json")
    assert one != two
    assert durable.is_scratch(one)
    assert durable.is_scratch(durable.scratch_name("iter_0000000100", delete=True))
    for name in (".tmp-mine", ".tmp-run_id-123", "iter_0000000100", one + "x", one + "\n"):
        assert not durable.is_scratch(name)


def test_a_small_file_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        durable.write_small(str(tmp_path), "best.json", text)
        assert (tmp_path / "best.json").read_text() == text
    assert os.listdir(tmp_path) == ["best.json"]


def test_a_small_file_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.write_small(str(tmp_path), "best.json", "one")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        durable.write_small(str(tmp_path), "best.json", "two")
    assert (tmp_path / "best.json").read_text() == "one"
    assert os.listdir(tmp_path) == ["best.json"]


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_systems_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raises:
        with pytest.raises(OSError):
            durable.sync_folder(str(tmp_path))
    else:
        durable.sync_folder(str(tmp_path))


def test_without_locks_the_time_of_change_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / durable.scratch_name("iter_0000000100")
    scratch.mkdir()
    (scratch / durable.LOCKED_FILE).write_text("")

    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (scratch / durable.LOCKED_FILE).open() as file:
        durable.lock(file.fileno())
    assert durable.in_use(str(scratch))
    os.utime(scratch, (0, 0))
    assert not durable.in_use(str(scratch))


def test_a_writer_about_to_create_its_lock_is_waited_for(tmp_path: Path) -> None:
    scratch = tmp_path / durable.scratch_name("iter_0000000100")
    scratch.mkdir()
    assert durable.in_use(str(scratch))
    os.utime(scratch, (0, 0))
    assert not durable.in_use(str(scratch))
    assert not durable.in_use(str(tmp_path / "gone"))


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / durable.scratch_name("run_id")
    fd = durable.create(str(path))
    durable.lock(fd)
    assert durable.in_use(str(path))
    os.close(fd)
    assert not durable.in_use(str(path))


def test_what_is_being_deleted_may_be_deleted_by_anybody(tmp_path: Path) -> None:
    scratch = tmp_path / durable.scratch_name("iter_0000000100", delete=True)
    scratch.mkdir()
    assert not durable.in_use(str(scratch))
    durable.remove(str(scratch))
    durable.remove(str(scratch))
    assert os.listdir(tmp_path) == []


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    durable.remove(str(link))
    assert os.listdir(tmp_path) == ["target"]
