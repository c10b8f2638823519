"""Whole records only, whatever the disk does."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.files import append_file as appendfile
from distrain.files.append_file import AppendFile


def full_disk(monkeypatch: pytest.MonkeyPatch, *, free: int) -> Callable[[], None]:
    """Let os.write take `free` bytes and then fail; returns what frees the disk."""
    write = os.write
    left = [free]

    def limited(fd: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(fd, data[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(appendfile.os, "write", limited)

    def give() -> None:
        left[0] = 1 << 30

    return give


def test_one_flush_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    write = os.write

    def spy(fd: int, data: memoryview) -> int:
        calls.append(bytes(data))
        return write(fd, data)

    monkeypatch.setattr(appendfile.os, "write", spy)
    file = AppendFile(tmp_path / "f")
    file.append(b"one\n")
    file.append(b"two\n")
    assert (tmp_path / "f").read_bytes() == b""
    file.flush()
    file.flush()
    assert calls == [b"one\ntwo\n"]
    file.close()
    file.close()
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\n"


def test_continues_a_file_or_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old\n")
    file = AppendFile(tmp_path / "f")
    file.append(b"new\n")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"old\nnew\n"
    with pytest.raises(FileExistsError):
        AppendFile(tmp_path / "f", exclusive=True)


def test_failed_write_is_taken_back_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AppendFile(tmp_path / "f")
    file.append(b"first\n")
    file.flush()
    give = full_disk(monkeypatch, free=4)
    file.append(b"second\n")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/f'"):
        file.flush()
    assert (tmp_path / "f").read_bytes() == b"first\n"  # not b"first\nseco"
    file.append(b"third\n")
    with pytest.raises(OSError):
        file.flush()
    give()
    file.append(b"fourth\n")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"first\nsecond\nthird\nfourth\n"


def test_waiting_records_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(appendfile, "MAX_WAITING_BYTES", 10)
    give = full_disk(monkeypatch, free=0)
    file = AppendFile(tmp_path / "f")
    for _ in range(3):  # 6, then 12 > 10: dropped, then 6
        file.append(b"12345\n")
        with pytest.raises(OSError):
            file.flush()
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}/f: 12 bytes could not be written and are lost"
    ]
    give()
    file.close()
    assert (tmp_path / "f").read_bytes() == b"12345\n"


def test_close_releases_the_file_though_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, free=0)
    before = len(os.listdir("/proc/self/fd"))
    file = AppendFile(tmp_path / "f")
    file.append(b"lost\n")
    file.append(b"lost too\n")
    with pytest.raises(OSError, match="2 records are lost: No space left on device"):
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
