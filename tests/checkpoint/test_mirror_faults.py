"""Faults of the mirror: its process, its store and its place; training goes on, nothing is lost."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import checkpoints, iterations_in

from distrain.checkpoint import mirror as mirror_module
from distrain.checkpoint import mirror_client
from distrain.checkpoint.mirror import Fetch, Mirror, MirrorUnreadable

KEEP = {"last": 3, "every": None}


def finish(mirror: Mirror) -> bool:
    try:
        return mirror.finish(lambda: False)
    finally:
        mirror.close()


def test_a_process_that_cannot_be_started_is_a_failure_that_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path / "run", 10)
    real, calls = mirror_module.MirrorProcess, []

    def start(**task: Any) -> mirror_client.MirrorProcess:
        calls.append(task)
        if len(calls) < 3:
            raise BlockingIOError("no more processes")
        return real(**task)

    monkeypatch.setattr(mirror_module, "MirrorProcess", start)
    mirror = Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP)
    assert finish(mirror)
    assert (mirror.uploaded, mirror.failed, mirror.why) == (1, 1, "")
    assert iterations_in(tmp_path / "place") == [10]


def test_a_process_that_died_after_the_last_upload_leaves_nothing_to_report(
    tmp_path: Path,
) -> None:
    checkpoints(tmp_path / "run", 10)
    assert finish(Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP))
    mirror = Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP)
    assert mirror._process is not None
    mirror._process._process.kill()
    assert finish(mirror)
    assert (mirror.uploaded, mirror.failed) == (0, 1)


@pytest.mark.parametrize("work", ["fetch", "follow"])
def test_a_library_that_cannot_be_imported_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    checkpoints(tmp_path / "run", 10)
    broken = "import sys; sys.modules['fsspec'] = None; " + mirror_client._CODE
    monkeypatch.setattr(mirror_client, "_CODE", broken)
    url = f"file://{tmp_path}/place"
    if work == "fetch":
        fetch = Fetch(url, tmp_path / "run", newer_than=-1)
        try:
            with pytest.raises(MirrorUnreadable, match="ModuleNotFoundError"):
                list(fetch.look())
        finally:
            fetch.close()
        return
    mirror = Mirror(url, tmp_path / "run", keep=KEEP)
    try:
        assert not mirror.finish(lambda: mirror.failed > 0)
        assert "ModuleNotFoundError" in mirror.why
    finally:
        mirror.close()
