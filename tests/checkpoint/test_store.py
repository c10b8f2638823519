"""The store: training waits for a copy, what fails leaves no trace, what was saved comes back."""

import logging
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from checkpoint_cases import (
    InlineStore,
    best_of,
    checkpoints,
    identical,
    iterations_in,
    names_in,
    path_of,
    scratch_in,
    small_state,
    state_digests,
)
from torch import nn

from distrain.checkpoint import format as fmt
from distrain.checkpoint.store import CheckpointStore, SaveFailed, describe
from distrain.errors import ConfigError


@pytest.fixture(params=[CheckpointStore, InlineStore], ids=["background", "inline"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    """Return an empty store of each kind; none may leave an open file behind."""
    before = len(os.listdir("/proc/self/fd"))
    store = request.param(tmp_path / "checkpoints")
    yield store
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_state_may_change_as_soon_as_save_returns(store: CheckpointStore) -> None:
    state = small_state(1)
    store.save(100, state, world_size=2)
    for parameter in state["model"].values():
        parameter.fill_(7)
    state["hooks"]["best"]["metric"] = 3.0
    assert store.wait()
    assert identical(store.load(100), small_state(1))
    assert (store.last_saved, store.last_error) == (100, None)


def test_the_manifest_notes_what_save_was_given(tmp_path: Path) -> None:
    store = InlineStore(tmp_path, attempt=3)
    store.save(100, small_state(1), world_size=7, best={"accuracy": 0.5})
    store.save(200, small_state(1), world_size=7)
    one, two = describe(path_of(tmp_path, 100)), describe(path_of(tmp_path, 200))
    assert (one.iteration, one.world_size) == (100, 7)
    first, second = (fmt.read_manifest(str(found.path)) for found in (one, two))
    assert (first["best"], first["attempt"], second["best"]) == ({"accuracy": 0.5}, 3, {})
    assert one.run_id == two.run_id == (tmp_path / "run_id").read_text().strip()
    assert one.bytes == sum((one.path / name).stat().st_size for name in fmt.FILES)
    assert one.digests == two.digests == state_digests(small_state(1))


def test_many_saves_larger_and_smaller(store: CheckpointStore) -> None:
    sizes = [10, 1_000_000, 1_000_001, 0, 3_000_000, 10]
    for iteration, size in enumerate(sizes, start=1):
        store.save(iteration, {"model": {"w": torch.full((size,), iteration)}}, world_size=1)
        assert store.wait()
        assert torch.equal(store.load(iteration)["model"]["w"], torch.full((size,), iteration))


def test_the_first_save_may_be_prepared(store: CheckpointStore) -> None:
    state = {"model": {"w": torch.randn(1_000_000)}}
    store.reserve(state)
    store.reserve(small_state())
    store.save(1, state, world_size=1)
    assert store.wait()
    assert identical(store.load(1), state)
    with pytest.raises(ConfigError, match=r"checkpoint state at hooks\.x: a builtins\.set"):
        store.reserve({"hooks": {"x": set()}})


def test_a_resumed_model_takes_the_same_next_step(store: CheckpointStore) -> None:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object) -> None:
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()
        schedule.step()  # type: ignore[attr-defined]

    torch.manual_seed(0)
    straight = parts()
    step(*straight)
    names = ("model", "optimizer", "schedule")
    state = {name: part.state_dict() for name, part in zip(names, straight, strict=True)}
    store.save(1, {**state, "rng": torch.get_rng_state()}, world_size=1)
    step(*straight)
    torch.manual_seed(5)
    resumed = parts()
    loaded = store.load(1) if store.wait() else {}
    for name, part in zip(names, resumed, strict=True):
        part.load_state_dict(loaded[name])
    torch.set_rng_state(loaded["rng"])
    step(*resumed)
    for one, two in zip(straight, resumed, strict=True):
        assert identical(one.state_dict(), two.state_dict())


def test_a_valid_checkpoint_of_the_iteration_is_left(store: CheckpointStore) -> None:
    checkpoints(store.folder, 100).close()
    before = (path_of(store.folder, 100) / fmt.MANIFEST_FILE).stat()
    store.save(100, small_state(2), world_size=5)
    assert store.wait()
    after = (path_of(store.folder, 100) / fmt.MANIFEST_FILE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert identical(store.load(100), small_state(100))


def test_saving_an_iteration_twice_costs_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(100, small_state(1), world_size=1)
    monkeypatch.setattr("distrain.checkpoint.encode.encode", lambda _: pytest.fail("copied"))
    store.save(100, small_state(1), world_size=1)
    assert store.wait()


def test_a_damaged_checkpoint_of_the_iteration_is_replaced(store: CheckpointStore) -> None:
    checkpoints(store.folder, 100).close()
    os.truncate(path_of(store.folder, 100) / fmt.MODEL_FILE, 100)
    store.save(100, small_state(2), world_size=5)
    assert store.wait()
    assert identical(store.load(100), small_state(2))
    assert names_in(store.folder) == ["iter_0000000100", "run_id"]


def test_what_may_be_somebody_elses_is_moved_aside(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    folder = path_of(store.folder, 100)
    folder.mkdir(parents=True)
    (folder / "precious").write_text("x")
    store.save(100, small_state(2), world_size=5)
    assert store.wait()
    assert identical(store.load(100), small_state(2))
    (aside,) = store.folder.glob("iter_0000000100.damaged-*")
    assert (aside / "precious").read_text() == "x"
    assert str(aside) in caplog.text


def test_a_valid_checkpoint_of_another_run_does_not_stand_for_this_state(
    store: CheckpointStore,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints(store.folder, 50).close()
    other = checkpoints(tmp_path_factory.mktemp("other"), 100)
    other.close()
    shutil.copytree(path_of(other.folder, 100), path_of(store.folder, 100))
    store.save(100, small_state(2), world_size=5)
    assert store.wait()
    assert identical(store.load(100), small_state(2))
    (aside,) = store.folder.glob("iter_0000000100.other-*")
    assert identical(store.load(aside), small_state(100))
    assert f"was written by another run; renamed to {aside}" in caplog.text


def test_a_state_that_cannot_be_saved_is_the_callers_mistake(store: CheckpointStore) -> None:
    with pytest.raises(TypeError, match=r"at optimizer\.0\.x: a builtins\.function"):
        store.save(100, {"optimizer": [{"x": lambda: 0}]}, world_size=1)
    assert not store.folder.exists()
    store.save(100, small_state(), world_size=1)
    assert store.wait()


def assert_failed_and_recovers(
    store: CheckpointStore, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that the save of 200 failed with one warning, and that 100 is as it was."""
    assert not store.wait()
    assert store.last_error is not None
    assert why in store.last_error
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"checkpoint 200 in {store.folder} was not saved" in record.message
    assert why in record.message
    assert scratch_in(store.folder) == []
    found = store.newest_valid()
    assert found is not None
    assert (found.iteration, store.last_saved) == (100, 100)
    assert identical(store.load(100), small_state(100))


def test_a_full_disk(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    store.folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(store.folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        store.save(100, small_state(100), world_size=1)
        assert store.wait()
        store.save(200, {"model": {"w": torch.zeros(500_000)}}, world_size=1)
        assert_failed_and_recovers(store, "No space left on device", caplog)
        store.save(300, small_state(300), world_size=1)
        assert store.wait()
        assert store.last_error is None
    finally:
        store.close()
        subprocess.run(["umount", str(store.folder)], check=True)


def test_a_limit_on_file_sizes(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    large = {"model": {"w": torch.zeros(500_000)}}
    store.reserve(large)
    store.save(100, small_state(100), world_size=1)
    assert store.wait()
    limit = (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    writers = psutil.Process().children() or [psutil.Process()]  # inline, this process writes
    before = resource.prlimit(writers[0].pid, resource.RLIMIT_FSIZE, limit)
    try:
        store.save(200, large, world_size=1)
        assert_failed_and_recovers(store, "File too large", caplog)
    finally:
        resource.prlimit(writers[0].pid, resource.RLIMIT_FSIZE, before)
    store.save(300, large, world_size=1)
    assert store.wait()


def test_no_file_handles_left(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints(store.folder, 100).close()
    store.last_saved = 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        store.save(200, small_state(), world_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_failed_and_recovers(store, "Too many open files", caplog)
    store.save(300, small_state(300), world_size=1)
    assert store.wait()


def test_a_file_in_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save(100, small_state(), world_size=1)
    assert not store.wait()
    assert "Not a directory" in str(store.last_error)
    assert store.newest_valid() is None
    (record,) = caplog.records
    assert "training goes on" in record.message
    (tmp_path / "run").unlink()
    store.save(100, small_state(), world_size=1)
    assert store.wait()
    store.close()


def test_on_error_raise_in_the_background(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    store = CheckpointStore(tmp_path / "run" / "c", on_error="raise")
    store.save(100, small_state(), world_size=1)
    with pytest.raises(SaveFailed, match="checkpoint 100 in .* was not saved: NotADirectoryError"):
        store.wait()
    assert not store.wait()  # told once
    store.close()


def test_on_error_raise_inline(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    store = InlineStore(tmp_path / "run" / "c", on_error="raise")
    with pytest.raises(SaveFailed, match="checkpoint 100 in .* was not saved: NotADirectoryError"):
        store.save(100, small_state(), world_size=1)
    store.close()


def test_poll_does_not_wait(store: CheckpointStore) -> None:
    assert store.poll()
    store.save(100, {"model": {"w": torch.zeros(2_000_000)}}, world_size=1)
    while not store.poll():
        assert store.last_saved is None
    assert store.last_saved == 100


def test_a_closed_store_can_save_again(store: CheckpointStore) -> None:
    for iteration in (1, 2):
        store.save(iteration, small_state(iteration), world_size=1)
        store.close()
        store.close()
    assert iterations_in(store.folder) == [1, 2]


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o644), (0o022, 0o644), (0o077, 0o600)])
def test_others_can_read_as_the_umask_says_and_never_write(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        store = CheckpointStore(tmp_path / "run" / "checkpoints")
        store.save(100, small_state(), world_size=1, best={"accuracy": 1.0})
        store.close()
    finally:
        os.umask(before)
    folder = path_of(store.folder, 100)
    files = [*folder.iterdir(), store.folder / "run_id", store.folder / "best.json"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
    folder_mode = mode | (mode & 0o444) >> 2
    assert {stat.S_IMODE(f.stat().st_mode) for f in (store.folder, folder)} == {folder_mode}


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}, {"on_error": "ignore"}])
def test_wrong_options_are_named(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        CheckpointStore(tmp_path, **options)


def test_nothing_to_find(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.newest_valid() is None
    assert best_of(store) == {}
    store.close()
    assert not store.folder.exists()
