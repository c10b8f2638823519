"""Faults of the mirror: its process, its store and its place; training goes on, nothing is lost."""

import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from checkpoint_cases import checkpoints, iterations_in, path_of, small_state
from mirror_cases import KEEP, URL, fetched
from s3_server import BUCKET, S3Server, until

from distrain.checkpoint import format as fmt
from distrain.checkpoint import mirror as mirror_module
from distrain.checkpoint import mirror_process
from distrain.checkpoint.mirror import Fetch, Mirror, MirrorUnreadable
from distrain.checkpoint.mirror_store import Place, StoreError
from distrain.checkpoint.mirror_upload import Uploader
from distrain.errors import RunFailed


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

    def start(**task: Any) -> mirror_module.MirrorProcess:
        calls.append(task)
        if len(calls) < 3:
            raise BlockingIOError("no more processes")
        return real(**task)

    monkeypatch.setattr(mirror_module, "MirrorProcess", start)
    mirror = Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP)
    assert finish(mirror)
    assert (mirror.uploaded, mirror.failed, mirror.why) == (1, 2, "")
    assert iterations_in(tmp_path / "place") == [10]


def test_a_process_that_died_after_the_last_upload_leaves_nothing_to_report(
    tmp_path: Path,
) -> None:
    checkpoints(tmp_path / "run", 10)
    assert finish(Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP))
    mirror = Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP)
    until(lambda: mirror._process is not None)
    assert mirror._process is not None
    mirror._process._process.kill()
    assert finish(mirror)
    assert (mirror.uploaded, mirror.failed) == (0, 1)


def test_what_a_library_prints_is_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(tmp_path / "run", 10)
    noisy = (
        "import os; nice = os.nice; os.nice = lambda n: (print('a notice', flush=True), nice(n)); "
    )
    monkeypatch.setattr(mirror_module, "_CODE", noisy + mirror_module._CODE)
    mirror = Mirror(f"file://{tmp_path}/place", tmp_path / "run", keep=KEEP)
    assert finish(mirror)
    assert (mirror.uploaded, mirror.failed) == (1, 0)


@pytest.mark.parametrize("work", ["fetch", "follow"])
def test_a_library_that_cannot_be_imported_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    checkpoints(tmp_path / "run", 10)
    broken = "import sys; sys.modules['fsspec'] = None; " + mirror_module._CODE
    monkeypatch.setattr(mirror_module, "_CODE", broken)
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


@pytest.mark.parametrize("size", [0, fmt.MAX_MANIFEST_BYTES + 10])
def test_an_empty_or_huge_manifest_is_a_damaged_checkpoint(
    s3: S3Server, tmp_path: Path, size: int
) -> None:
    """S3 has no ranges of an empty object."""
    checkpoints(tmp_path / "run", 10)
    s3.put("runs/mine/iter_0000000020/manifest.json", b" " * size)
    s3.put("runs/mine/run.yaml", b"")
    fetch = fetched(tmp_path / "new")
    assert (fetch.name, fetch.newer, fetch.num) == ("", [20], 1), "no reason to begin at 0"
    assert finish(Mirror(URL, tmp_path / "run", keep=KEEP))
    assert fetched(tmp_path / "new").name == "iter_0000000010"


def test_after_a_failure_credentials_are_read_again(s3: S3Server, tmp_path: Path) -> None:
    """As those in a file that another program renews."""
    checkpoints(tmp_path / "run", 10)
    used: list[Any] = []
    real = Place.checkpoints

    def expired(self: Place) -> Any:
        used.append(self._fs)
        if used[0] is self._fs:
            raise StoreError("ExpiredToken")
        return real(self)

    task = {"url": URL, "folder": str(tmp_path / "run"), "keep": KEEP, "old": []}
    finished = threading.Event()
    finished.set()
    events: list[dict[str, Any]] = []
    with (
        mock.patch.object(Place, "checkpoints", expired),
        mock.patch.object(mirror_process, "report", events.append),
    ):
        mirror_process.follow(task, finished)
    assert [event["event"] for event in events] == ["failed", "uploaded", "recovered", "settled"]


def test_a_full_local_disk_is_not_a_store_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run went on from an older local checkpoint, or was to be run again with another store."""
    url = f"file://{tmp_path}/place"
    checkpoints(tmp_path / "run", 10)
    assert finish(Mirror(url, tmp_path / "run", keep=KEEP))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    monkeypatch.setattr(mirror_module, "_CODE", limit + mirror_module._CODE)
    with pytest.raises(
        RunFailed, match="cannot be written: .*new.*: File too large; no checkpoint"
    ):
        fetched(tmp_path / "new", url)
    assert os.listdir(tmp_path / "new") == []


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    place = Place(f"file://{tmp_path}")
    for number in (9_999_999_999, 10_000_000_000):
        (tmp_path / f"iter_{number}").mkdir()
    assert [each.iteration for each in place.checkpoints()] == [10_000_000_000, 9_999_999_999]


@pytest.mark.parametrize(("method", "path"), [("DELETE", "iter_"), ("GET", r"^/bucket/?\?uploads")])
def test_a_store_that_deletes_nothing_gets_every_checkpoint(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    """As one of which the run may not list multipart uploads, or that keeps all objects."""
    keep = {"last": 1, "every": None}
    store = checkpoints(tmp_path / "run", 10)
    assert finish(Mirror(URL, tmp_path / "run", keep=keep))
    s3.fault("403", method=method, path=path)
    for iteration in (20, 30):
        store.save(iteration, small_state(iteration), world_size=1)
        store.wait()
        mirror = Mirror(URL, tmp_path / "run", keep=keep)
        assert finish(mirror), mirror.why
        assert (mirror.uploaded, mirror.failed) == (1, 0)
    assert "are left there: " in caplog.text
    assert s3.num_faults() > 0
    found = sorted({key.split("/")[2] for key in s3.objects("runs/mine/iter")})
    left = [10, 20] if method == "DELETE" else []
    assert found == [fmt.folder_name(iteration) for iteration in (*left, 30)]


def test_uploads_that_fail_leave_one_half_at_most(tmp_path: Path) -> None:
    """As on a full disk, which halves of them would keep full."""
    store = checkpoints(tmp_path / "run")
    place = Place(f"file://{tmp_path}/place")
    work = Uploader(place, str(tmp_path / "run"), keep=KEEP, report=lambda event: None)
    for iteration in (10, 20, 30):
        store.save(iteration, small_state(iteration), world_size=1)
        store.wait()
        with (
            mock.patch.object(Place, "write", side_effect=StoreError("no space left")),
            pytest.raises(StoreError),
        ):
            work.step()
        assert iterations_in(tmp_path / "place") == [iteration]
    while not work.step():
        pass
    assert [each.why_not for each in place.checkpoints()] == [""]


@pytest.mark.parametrize("harm", ["delete", "replace"])
def test_files_that_another_process_changes_during_an_upload_are_uploaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """As a second process of the run: it removes half an upload, or uploads its own one."""
    checkpoints(tmp_path / "run", 10)
    place = Place(f"file://{tmp_path}/place")
    events: list[str] = []
    work = Uploader(
        place, str(tmp_path / "run"), keep=KEEP, report=lambda event: events.append(event["event"])
    )
    real = Place.write

    def write(self: Place, path: str, data: bytes) -> None:
        (half,) = self.checkpoints()
        if harm == "delete":
            self.remove(half)
        real(self, path, data)
        if harm == "replace":
            fields = fmt.parse_manifest(data, path)
            other = fmt.render_manifest({**fields, "attempt": 7})
            real(self, path, other)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", write)
        with pytest.raises(StoreError, match="another process has changed it there"):
            work.step()
    while not work.step():
        pass
    assert events == ["uploaded"]
    (stored,) = place.checkpoints()
    assert stored.why_not == ""
    assert stored.raw == (path_of(tmp_path / "run", 10) / fmt.MANIFEST_FILE).read_bytes()


@pytest.mark.parametrize(
    "name", ["a b%20c/ünï", "runs//x", "a::b", "x/../y", "star*[1]", "end/", "iter_0000000001"]
)
@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_a_place_has_the_name_of_its_url(
    s3: S3Server, tmp_path: Path, scheme: str, name: str
) -> None:
    checkpoints(tmp_path / "run", 10)
    url = f"s3://{BUCKET}/{name}" if scheme == "s3" else f"file://{tmp_path}/{name}"
    work = Uploader(Place(url), str(tmp_path / "run"), keep=KEEP, report=lambda event: None)
    while not work.step():
        pass
    assert [each.why_not for each in Place(url).checkpoints()] == [""]
    if scheme == "file":
        assert iterations_in(Path(f"{tmp_path}/{name}")) == [10]
    else:
        assert Place(f"s3://{BUCKET}/a").checkpoints() == []
