"""The mirror of checkpoints: half of one never counts, what is kept, whose it is, what fails."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoint_cases import (
    checkpoints,
    identical,
    iterations_in,
    names_in,
    path_of,
    scratch_in,
    small_state,
)
from fsspec.implementations.memory import MemoryFileSystem
from mirror_cases import KEEP, URL, fetched
from s3_server import BUCKET, S3Server, environment_of, until

from distrain.checkpoint import format as fmt
from distrain.checkpoint.mirror import Mirror, MirrorRefused, MirrorUnreadable
from distrain.checkpoint.mirror_fetch import fetch
from distrain.checkpoint.mirror_status import read_status
from distrain.checkpoint.mirror_store import Place, StoreError, one_line
from distrain.checkpoint.mirror_upload import OtherRun, Uploader, refuse_other
from distrain.checkpoint.mirror_url import check_url
from distrain.checkpoint.retention import read_run_id
from distrain.checkpoint.store import CheckpointStore, describe
from distrain.errors import ConfigError

Events = list[dict[str, Any]]


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    url = f"file://{tmp_path}/place" if request.param == "file" else "memory://place/of/run"
    yield Place(url)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def file_place(tmp_path: Path) -> Place:
    return Place(f"file://{tmp_path}/place")


def uploader(place: Place, folder: Path, events: Events, keep: dict[str, Any] = KEEP) -> Uploader:
    return Uploader(place, str(folder), keep=keep, report=events.append)


def upload(place: Place, folder: Path, keep: dict[str, Any] = KEEP) -> Events:
    """Upload until nothing is left; return the events."""
    events: Events = []
    work = uploader(place, folder, events, keep)
    while not work.step():
        pass
    return events


def download(place: Place, folder: Path, newer_than: int = -1) -> tuple[str, list[str]]:
    """Fetch; return the published name and what was passed over."""
    events: Events = []
    name = fetch(
        place, place.checkpoints(), str(folder), newer_than=newer_than, report=events.append
    )
    return name, [event["why"] for event in events if event["event"] == "passed_over"]


def complete(place: Place) -> list[int]:
    return [each.iteration for each in reversed(place.checkpoints()) if not each.why_not]


def test_what_comes_back_on_a_new_disk_is_what_was_saved(place: Place, tmp_path: Path) -> None:
    store = checkpoints(tmp_path / "old", 10, 20)
    upload(place, tmp_path / "old")
    new = tmp_path / "new" / "checkpoints"
    assert download(place, new) == ("iter_0000000020", [])
    again = CheckpointStore(new)
    assert identical(again.load(20), store.load(20))
    assert read_run_id(str(new)) == read_run_id(str(tmp_path / "old"))
    assert names_in(new) == ["iter_0000000020", "run_id"]
    assert names_in(path_of(new, 20)) == names_in(path_of(tmp_path / "old", 20))
    assert download(place, new, newer_than=20) == ("", [])


def test_an_empty_place_is_empty(place: Place, tmp_path: Path) -> None:
    assert place.checkpoints() == []
    assert download(place, tmp_path / "new") == ("", [])
    assert not (tmp_path / "new").exists()


def test_wherever_an_upload_breaks_half_of_it_never_counts(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails the k-th operation that writes, for every k; then the upload is completed."""
    folder = tmp_path / "checkpoints"
    checkpoints(folder, 10)
    upload(place, folder)
    checkpoints(folder, 20)
    steps: list[str] = []
    limit = 0

    def count(path: str) -> None:
        if len(steps) == limit:
            raise StoreError("on purpose")
        steps.append(path)

    real_put, real_write = Place.put, Place.write

    def put(self: Place, local: str, path: str) -> None:
        count(path)
        real_put(self, local, path)

    def write(self: Place, path: str, data: bytes) -> None:
        count(path)
        real_write(self, path, data)

    monkeypatch.setattr(Place, "put", put)
    monkeypatch.setattr(Place, "write", write)
    for limit in range(4):
        steps.clear()
        with pytest.raises(StoreError):
            uploader(place, folder, []).step()
        assert len(steps) == limit
        assert complete(place) == [10]
        name, passed_over = download(place, tmp_path / f"new-{limit}")
        assert name == "iter_0000000010"
        assert [why.split("/")[-1] for why in passed_over] == (
            ["iter_0000000020 is half an upload"] if limit else []
        )
    limit = 100
    steps.clear()
    upload(place, folder)
    assert complete(place) == [10, 20]
    assert steps[-1] == "iter_0000000020/manifest.json"


@pytest.mark.parametrize("file", [*fmt.FILES, fmt.MANIFEST_FILE])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_one_is_passed_over_by_name(
    file_place: Place, tmp_path: Path, file: str, harm: str
) -> None:
    checkpoints(tmp_path / "old", 10)
    upload(file_place, tmp_path / "old")
    checkpoints(tmp_path / "old", 20)
    upload(file_place, tmp_path / "old")
    path = tmp_path / "place" / "iter_0000000020" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flip" else data[:-1])
    name, (why,) = download(file_place, tmp_path / "new")
    assert name == "iter_0000000010"
    assert f"{file_place.url}/iter_0000000020" in why
    assert iterations_in(tmp_path / "new") == [10]
    assert scratch_in(tmp_path / "new") == []


def test_a_damaged_local_one_makes_room(file_place: Place, tmp_path: Path) -> None:
    checkpoints(tmp_path / "run", 10)
    upload(file_place, tmp_path / "run")
    (path_of(tmp_path / "run", 10) / fmt.STATE_FILE).write_bytes(b"{}")
    assert download(file_place, tmp_path / "run")[0] == "iter_0000000010"
    assert describe(path_of(tmp_path / "run", 10)).valid


def test_a_damaged_local_one_is_not_uploaded(file_place: Place, tmp_path: Path) -> None:
    checkpoints(tmp_path / "run", 10, 20)
    (path_of(tmp_path / "run", 20) / fmt.STATE_FILE).write_bytes(b"{}")
    events = upload(file_place, tmp_path / "run")
    assert [event["event"] for event in events] == ["damaged", "uploaded"]
    assert complete(file_place) == [10]


def test_retention_is_that_of_the_disk(place: Place, tmp_path: Path) -> None:
    keep = {"last": 2, "every": 40}
    folder = tmp_path / "checkpoints"
    store = checkpoints(folder, keep_last=2, keep_every=40)
    for iteration in range(10, 101, 10):
        best = {"accuracy": iteration / 100} if iteration in (20, 50) else None
        store.save(iteration, small_state(iteration), world_size=1, best=best)
        upload(place, folder, keep)
        assert complete(place) == iterations_in(folder)
    assert complete(place) == [40, 50, 80, 90, 100]


def test_a_new_disk_deletes_no_best_one(place: Place, tmp_path: Path) -> None:
    old = checkpoints(tmp_path / "old", keep_last=1)
    old.save(10, small_state(1), world_size=1, best={"accuracy": 0.9})
    upload(place, tmp_path / "old", {"last": 1, "every": None})
    old.save(20, small_state(2), world_size=1)
    upload(place, tmp_path / "old", {"last": 1, "every": None})
    download(place, tmp_path / "new")
    checkpoints(tmp_path / "new", 30, keep_last=1)
    upload(place, tmp_path / "new", {"last": 1, "every": None})
    assert iterations_in(tmp_path / "new") == [30]
    assert complete(place) == [10, 30]


def test_later_ones_of_the_place_neither_count_nor_go(place: Place, tmp_path: Path) -> None:
    """A run that went on from an older local checkpoint replaces them when it gets there."""
    keep = {"last": 1, "every": None}
    checkpoints(tmp_path / "old", 10)
    upload(place, tmp_path / "old", keep)
    download(place, tmp_path / "other")
    checkpoints(tmp_path / "old", 40)
    upload(place, tmp_path / "old", keep)
    assert complete(place) == [40]
    checkpoints(tmp_path / "other", 20, 30, keep_last=1)
    upload(place, tmp_path / "other", keep)
    assert complete(place) == [30, 40]
    checkpoints(tmp_path / "other", 40, keep_last=1)
    upload(place, tmp_path / "other", keep)
    assert complete(place) == [40]
    stored = place.checkpoints()[0].raw
    assert stored == (path_of(tmp_path / "other", 40) / fmt.MANIFEST_FILE).read_bytes()


def test_retention_deletes_a_checkpoint_during_its_upload(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with saves that are faster than uploads, of which none would ever be complete."""
    folder = tmp_path / "checkpoints"
    store = checkpoints(folder, 10)
    real = Place.put

    def put(self: Place, local: str, path: str) -> None:
        if path.startswith("iter_0000000010"):
            shutil.rmtree(path_of(folder, 10), ignore_errors=True)
        real(self, local, path)

    monkeypatch.setattr(Place, "put", put)
    work = uploader(place, folder, [])
    work.step()
    assert iterations_in(folder) == []
    assert complete(place) == [10]
    assert download(place, tmp_path / "new")[0] == "iter_0000000010"
    assert identical(CheckpointStore(tmp_path / "new").load(10), small_state(10))
    store.save(20, small_state(20), world_size=1)
    while not work.step():
        pass
    assert complete(place) == [10, 20]


def test_the_newest_comes_first_and_the_others_are_counted(place: Place, tmp_path: Path) -> None:
    folder, events = tmp_path / "checkpoints", Events()
    store = checkpoints(folder, 10, 20)
    work = Uploader(place, str(folder), keep=KEEP, old=[10, 20], report=events.append)
    while not work.step():
        pass
    assert events == [{"event": "uploaded", "iteration": 20}], "10 is of an earlier start"
    for iteration in (30, 40, 50):
        best = {"accuracy": 0.5} if iteration == 30 else None
        store.save(iteration, small_state(iteration), world_size=1, best=best)
    while not work.step():
        pass
    assert events[1:] == [
        {"event": "uploaded", "iteration": 50},
        {"event": "skipped", "iterations": [40]},
        {"event": "uploaded", "iteration": 30},
    ]
    assert (work.status.uploaded, work.status.skipped, work.status.newest) == (3, 1, 50)
    assert complete(place) == [20, 30, 50]


def test_a_mark_that_is_added_uploads_no_tensor_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    store = checkpoints(folder, 10)
    upload(place, folder)
    store.save(10, small_state(10), world_size=2, best={"accuracy": 0.5})
    files: list[str] = []
    monkeypatch.setattr(Place, "put", lambda self, local, path: files.append(path))
    upload(place, folder)
    assert files == []
    manifest = place.checkpoints()[0].manifest
    assert manifest is not None
    assert manifest["best"] == {"accuracy": 0.5}


def test_nothing_is_asked_while_nothing_changes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path / "checkpoints", 10)
    work = uploader(place, tmp_path / "checkpoints", [])
    while not work.step():
        pass
    monkeypatch.setattr(Place, "checkpoints", None)
    assert work.step()


def test_another_run_at_the_place_is_refused_and_untouched(place: Place, tmp_path: Path) -> None:
    checkpoints(tmp_path / "one", 10)
    upload(place, tmp_path / "one")
    checkpoints(tmp_path / "two", 20)
    before = place.checkpoints()
    with pytest.raises(OtherRun, match=read_run_id(str(tmp_path / "one"))):
        upload(place, tmp_path / "two")
    assert place.checkpoints() == before
    refuse_other(before, None, place.url)


def test_half_uploads_are_removed_and_foreign_files_stay(file_place: Place, tmp_path: Path) -> None:
    for name, file in (("iter_0000000005", fmt.MODEL_FILE), ("iter_0000000007", "notes.txt")):
        (tmp_path / "place" / name).mkdir(parents=True)
        (tmp_path / "place" / name / file).write_text("x")
    (tmp_path / "place" / "readme").write_text("x")
    checkpoints(tmp_path / "checkpoints", 10)
    upload(file_place, tmp_path / "checkpoints")
    assert names_in(tmp_path / "place") == ["iter_0000000007", "iter_0000000010", "readme"]


def test_a_size_that_differs_is_a_failure(
    file_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path / "checkpoints", 10)
    filesystem = type(file_place._fs)
    real = filesystem.put_file

    def cut(self: Any, local: str, path: str, **options: Any) -> None:
        real(self, local, path, **options)
        os.truncate(path, 5)

    monkeypatch.setattr(filesystem, "put_file", cut)
    with pytest.raises(StoreError, match="it has 5 bytes there, not"):
        upload(file_place, tmp_path / "checkpoints")
    assert complete(file_place) == []


def test_the_configuration_is_mirrored_too(place: Place, tmp_path: Path) -> None:
    checkpoints(tmp_path / "run" / "checkpoints", 10)
    (tmp_path / "run" / "run.yaml").write_text("seed: 3\n")
    upload(place, tmp_path / "run" / "checkpoints")
    assert place.read("run.yaml") == b"seed: 3\n"


def test_the_status_is_in_the_run_folder(file_place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert read_status(run) is None
    checkpoints(run / "checkpoints", 10)
    work = uploader(file_place, run / "checkpoints", [])
    work.failed("the store is down")
    status = read_status(run)
    assert status is not None
    assert status.is_behind
    assert "last failure: the store is down" in status.line()
    while not work.step():
        pass
    status = read_status(run)
    assert status is not None
    assert not status.is_behind
    assert status.line() == (
        f"{file_place.url}: iteration 10 is there; 1 uploads, 0 skipped, 1 failures"
    )


GOOD = ["file:///data/mirror", "memory://x", "s3://bucket", "s3://bucket/runs/a@b:c"]
BAD = {
    "/data/mirror": "file:///data/mirror",
    "http://host/x": "expected a URL with one of s3://",
    "s3://AKID:hidden/word@bucket/x": "without credentials",
    "s3://AKID:hidden@bucket/x": "without credentials",
    "hidden@bucket": "expected a URL with one of s3://",
    "az://container/x?sig=hidden": "without credentials",
    "s3://": "expected a folder",
    "file://data": "absolute path",
}


@pytest.mark.parametrize("url", GOOD)
def test_urls_of_a_mirror(url: str) -> None:
    check_url("checkpoint.mirror", url)


@pytest.mark.parametrize("url", BAD)
def test_a_mistake_in_a_url_is_one_line_without_its_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_url("checkpoint.mirror", url)
    text = str(caught.value)
    assert text.startswith("checkpoint.mirror=")
    assert BAD[url] in text
    assert "hidden" not in text
    assert "\n" not in text


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrain.checkpoint.mirror_url.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'library gcsfs; pip install "distrain\[gs\]"'):
        check_url("checkpoint.mirror", "gs://bucket/x")


def test_a_reason_holds_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "hidden-word")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "other-hidden")
    error = OSError("no access with\nhidden-word and other-hidden, password=third-hidden")
    assert one_line(error) == "OSError: no access with *** and ***, password=***"


def test_the_training_process_imports_neither_fsspec_nor_torch_for_it() -> None:
    code = (
        "import sys; import distrain.checkpoint.mirror, distrain.config.keys; "
        "assert not {'torch', 'fsspec', 's3fs', 'asyncio'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# with a real S3 server, by the mirror's own process


def mirrored(folder: Path, url: str = URL, *, keep: dict[str, Any] = KEEP) -> Mirror:
    """Upload until nothing is left, by a mirror process."""
    mirror = Mirror(url, folder, keep=keep)
    try:
        assert mirror.finish(lambda: False), mirror.why
    finally:
        mirror.close()
    return mirror


@pytest.mark.ranks
def test_s3_round_trip_and_retention(s3: S3Server, tmp_path: Path) -> None:
    keep = {"last": 1, "every": None}
    store = checkpoints(tmp_path / "old", keep_last=1)
    store.save(10, small_state(1), world_size=1, best={"accuracy": 0.5})
    mirrored(tmp_path / "old", keep=keep)
    for iteration in (20, 30):
        store.save(iteration, small_state(iteration), world_size=1)
        mirrored(tmp_path / "old", keep=keep)
    names = sorted({key.split("/")[2] for key in s3.objects("runs/mine/")})
    assert names == ["iter_0000000010", "iter_0000000030"]
    work = fetched(tmp_path / "new")
    assert (work.name, work.newer, work.num) == ("iter_0000000030", [30, 10], 2)
    assert identical(CheckpointStore(tmp_path / "new").load(30), store.load(30))


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["500", "403", "cut"])
def test_s3_failures_are_counted_and_retried(s3: S3Server, tmp_path: Path, kind: str) -> None:
    checkpoints(tmp_path / "run" / "checkpoints", 10)
    s3.fault(kind, method="PUT", path="training.safetensors")
    mirror = Mirror(URL, tmp_path / "run" / "checkpoints", keep=KEEP)
    try:
        until(lambda: mirror.failed > 0)  # after the retries of the library
        assert "training.safetensors" in mirror.why
        assert fetched(tmp_path / "meanwhile").name == "", "half an upload"
        s3.clear()
        assert mirror.finish(lambda: False)
    finally:
        mirror.close()
    assert (mirror.uploaded, mirror.why) == (1, "")
    assert fetched(tmp_path / "new").name == "iter_0000000010"
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.newest, status.why) == (10, "")


@pytest.mark.ranks
def test_s3_that_is_slow_only_takes_longer(s3: S3Server, tmp_path: Path) -> None:
    checkpoints(tmp_path / "old", 10)
    s3.fault("slow")
    assert mirrored(tmp_path / "old").failed == 0
    assert fetched(tmp_path / "new").name == "iter_0000000010"


@pytest.mark.ranks
def test_a_server_that_is_down_is_not_an_empty_place(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path / "old", 10)
    with pytest.raises(MirrorUnreadable, match="there is no bucket elsewhere"):
        fetched(tmp_path / "new", "s3://elsewhere/x")
    assert fetched(tmp_path / "new", f"s3://{BUCKET}/nothing/here").num == 0
    for name, value in environment_of("http://127.0.0.1:9").items():  # the port of discard
        monkeypatch.setenv(name, value)
    with pytest.raises(MirrorUnreadable, match="127.0.0.1:9"):
        fetched(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    mirror = Mirror(URL, tmp_path / "old", keep=KEEP)
    try:
        assert not mirror.finish(lambda: mirror.failed >= 2)
        assert "127.0.0.1:9" in mirror.why
    finally:
        mirror.close()


@pytest.mark.ranks
def test_s3_of_another_run_is_refused_on_both_ways(s3: S3Server, tmp_path: Path) -> None:
    checkpoints(tmp_path / "one", 10)
    mirrored(tmp_path / "one")
    checkpoints(tmp_path / "two", 20)
    before = s3.objects()
    with pytest.raises(MirrorRefused, match="another run"):
        fetched(tmp_path / "two", newer_than=20)
    mirror = Mirror(URL, tmp_path / "two", keep=KEEP)
    try:
        assert not mirror.finish(lambda: False)
        assert "another run" in mirror.why
    finally:
        mirror.close()
    assert s3.objects() == before


@pytest.mark.ranks
def test_a_mirror_process_that_is_killed_starts_again(s3: S3Server, tmp_path: Path) -> None:
    checkpoints(tmp_path / "run", 10)
    s3.fault("hold", method="PUT", path="model.safetensors")
    mirror = Mirror(URL, tmp_path / "run", keep=KEEP)
    try:
        until(lambda: s3.num_faults() > 0)
        (process,) = mirror_processes()
        process.kill()
        until(lambda: mirror.failed > 0)
        assert "killed by signal 9" in mirror.why
        s3.clear()
        assert mirror.finish(lambda: False)
    finally:
        mirror.close()
    assert fetched(tmp_path / "new").name == "iter_0000000010"


@pytest.mark.ranks
def test_a_large_file_goes_in_parts_and_is_cut_in_the_middle(s3: S3Server, tmp_path: Path) -> None:
    """104 MB: in three parts; the parts of a cut upload are aborted, those of a kill at a start."""
    folder = tmp_path / "run"
    state = {"model": {"w": torch.arange(26_000_000, dtype=torch.int32)}}
    store = checkpoints(folder)
    store.save(10, state, world_size=1)
    s3.begin_upload("runs/mine/iter_0000000009/model.safetensors")
    s3.begin_upload("runs/other/iter_0000000009/model.safetensors")
    s3.fault("cut", method="PUT", path="model.safetensors")
    mirror = Mirror(URL, folder, keep=KEEP)
    try:
        until(lambda: mirror.failed > 0)
        s3.clear()
        assert mirror.finish(lambda: False)
    finally:
        mirror.close()
    assert s3.uploads() == ["runs/other/iter_0000000009/model.safetensors"]
    assert fetched(tmp_path / "new").name == "iter_0000000010"
    assert identical(CheckpointStore(tmp_path / "new").load(10), state)


def mirror_processes() -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process().children()
        if any("mirror_process" in word for word in each.cmdline())
    ]
