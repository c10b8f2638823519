"""Scratch files: names, small files, and locks that end with their process."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from distrain.checkpoint.scratch import (
    LOCKED_FILE,
    create,
    in_use,
    is_scratch,
    lock,
    remove,
    scratch_name,
    write_small,
)


def test_names() -> None:
    one, two = scratch_name("best.json"), scratch_name("best.json")
    assert one != two
    assert is_scratch(one)
    assert is_scratch(scratch_name("iter_0000000100", delete=True))
    for name in (".tmp-mine", ".tmp-run_id-123", "iter_0000000100", one + "x", one + "\n"):
        assert not is_scratch(name)


def test_a_small_file_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_small(str(tmp_path), "best.json", text)
        assert (tmp_path / "best.json").read_text() == text
    assert os.listdir(tmp_path) == ["best.json"]


def test_a_small_file_is_locked_until_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (locked.append(in_use(a)), replace(a, b)))
    write_small(str(tmp_path), "run_id", "0")
    assert locked == [True]


def test_a_small_file_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(str(tmp_path), "best.json", "one")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_small(str(tmp_path), "best.json", "two")
    assert (tmp_path / "best.json").read_text() == "one"
    assert os.listdir(tmp_path) == ["best.json"]


def test_without_locks_the_time_of_change_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / scratch_name("iter_0000000100")
    scratch.mkdir()
    (scratch / LOCKED_FILE).write_text("")

    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (scratch / LOCKED_FILE).open() as file:
        lock(file.fileno())
    assert in_use(str(scratch))
    os.utime(scratch, (0, 0))
    assert not in_use(str(scratch))


def test_a_writer_about_to_create_its_lock_is_waited_for(tmp_path: Path) -> None:
    scratch = tmp_path / scratch_name("iter_0000000100")
    scratch.mkdir()
    assert in_use(str(scratch))
    os.utime(scratch, (0, 0))
    assert not in_use(str(scratch))
    assert not in_use(str(tmp_path / "gone"))


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / scratch_name("run_id")
    fd = create(str(path))
    lock(fd)
    assert in_use(str(path))
    os.close(fd)
    assert not in_use(str(path))


def test_any_process_may_finish_a_deletion(tmp_path: Path) -> None:
    scratch = tmp_path / scratch_name("iter_0000000100", delete=True)
    scratch.mkdir()
    assert not in_use(str(scratch))
    remove(str(scratch))
    remove(str(scratch))
    assert os.listdir(tmp_path) == []


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    remove(str(link))
    assert os.listdir(tmp_path) == ["target"]
