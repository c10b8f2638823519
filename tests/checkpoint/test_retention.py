"""Which checkpoints stay: the last ones, every n-th, the best; and nothing foreign is deleted."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import (
    best_of,
    checkpoints,
    iterations_in,
    names_in,
    path_of,
    scratch_in,
    small_state,
)

from distrain.checkpoint import format as fmt
from distrain.checkpoint import retention as checkpoint_retention
from distrain.checkpoint import writer_process
from distrain.checkpoint.store import CheckpointStore


def save(store: CheckpointStore, *iterations: int, best: Mapping[str, float] | None = None) -> None:
    for iteration in iterations:
        store.save(iteration, small_state(iteration), world_size=1, best=best)


def flip(path: Path) -> None:
    """Alter a file so that its size stays."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_last_ones(tmp_path: Path) -> None:
    checkpoints(tmp_path, 10, 20, 30, 40, keep_last=2)
    assert iterations_in(tmp_path) == [30, 40]
    assert names_in(tmp_path) == ["iter_0000000030", "iter_0000000040", "run_id"]


def test_every_nth(tmp_path: Path) -> None:
    checkpoints(tmp_path, 10, 20, 30, 40, 50, 60, keep_last=1, keep_every=20)
    assert iterations_in(tmp_path) == [20, 40, 60]


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, 10, keep_last=1)
    assert best_of(store) == {}
    save(store, 20, best={"accuracy": 0.5})
    save(store, 30, 40)
    assert best_of(store) == {"accuracy": (20, 0.5)}
    assert iterations_in(tmp_path) == [20, 40]
    save(store, 50, best={"accuracy": 0.7})
    save(store, 60)
    assert best_of(store) == {"accuracy": (50, 0.7)}
    assert iterations_in(tmp_path) == [50, 60]
    fields = {"iteration": 50, "metric": 0.7}
    text = json.loads((tmp_path / "best.json").read_text())
    assert text == {**fields, "metrics": {"accuracy": fields}}


def test_each_metric_has_a_best_of_its_own(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, 10, keep_last=1)
    save(store, 20, best={"accuracy": 0.5, "loss": 2.0})
    save(store, 30, best={"loss": 1.0})
    save(store, 40)
    assert iterations_in(tmp_path) == [20, 30, 40]
    assert best_of(store) == {"accuracy": (20, 0.5), "loss": (30, 1.0)}
    save(store, 50, best={"accuracy": 0.6})
    save(store, 60, 70)
    assert iterations_in(tmp_path) == [30, 50, 70]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "metrics": {
            "accuracy": {"iteration": 50, "metric": 0.6},
            "loss": {"iteration": 30, "metric": 1.0},
        }
    }


def test_the_best_survives_a_resume(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=1)
    save(store, 10, best={"accuracy": 0.5})
    store.close()
    resumed = checkpoints(tmp_path, keep_last=1)
    assert best_of(resumed) == {"accuracy": (10, 0.5)}
    save(resumed, 20, 30)
    assert iterations_in(tmp_path) == [10, 30]
    save(resumed, 40, best={"accuracy": 0.6})
    assert best_of(resumed) == {"accuracy": (40, 0.6)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_best_must_be_finite(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=f"accuracy={value}"):
        save(checkpoints(tmp_path), 10, best={"accuracy": value})


def test_a_best_that_could_not_be_saved_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = checkpoints(tmp_path, keep_last=1, on_error="warn")
    save(store, 10, best={"accuracy": 0.5})
    store.wait()

    def full(folder: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer_process, "sync_folder", full)
        save(store, 20, best={"accuracy": 0.7})
    assert not store.wait()
    assert best_of(store) == {"accuracy": (10, 0.5)}
    save(store, 30)
    assert iterations_in(tmp_path) == [10, 30]
    assert "checkpoint 20" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"iteration": "x", "metric": 1}', "[" * 9999])
def test_the_manifests_decide_whatever_the_best_file_holds(tmp_path: Path, text: str) -> None:
    store = checkpoints(tmp_path, keep_last=1)
    save(store, 10, best={"accuracy": 0.5})
    right = (tmp_path / "best.json").read_text()
    (tmp_path / "best.json").write_text(text)
    assert best_of(store) == {"accuracy": (10, 0.5)}
    save(store, 20, 30)
    assert iterations_in(tmp_path) == [10, 30]
    assert (tmp_path / "best.json").read_text() == right


class Killed(BaseException):
    pass


FILE_OPERATIONS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


def killed_after(number: int, patched: pytest.MonkeyPatch) -> None:
    """Let the process die at a file operation; nothing that it would clean up is cleaned up."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in FILE_OPERATIONS:
        patched.setattr(os, name, counted(getattr(os, name)))


def test_killed_at_any_file_operation_the_best_is_marked_and_there(tmp_path: Path) -> None:
    outcomes = []
    for number in range(200):
        folder = tmp_path / str(number)
        store = checkpoints(folder, keep_last=1)
        save(store, 10, best={"accuracy": 0.5})
        save(store, 20)
        with pytest.MonkeyPatch.context() as patched:
            killed_after(number, patched)
            try:
                save(store, 30, best={"accuracy": 0.7})
                break
            except Killed:
                pass
        resumed = checkpoints(folder, keep_last=1)
        newest = resumed.newest_valid()
        assert newest is not None
        best = best_of(resumed)["accuracy"]
        # the state in the newest checkpoint says which value is the best, and so do the marks
        assert best == {20: (10, 0.5), 30: (30, 0.7)}[newest.iteration]
        save(resumed, 40, 50)
        assert iterations_in(folder) == [best[0], 50]
        assert best_of(resumed) == {"accuracy": best}
        assert json.loads((folder / "best.json").read_text())["iteration"] == best[0]
        assert scratch_in(folder) == []
        outcomes.append(newest.iteration)
    assert outcomes == sorted(outcomes)
    assert outcomes.count(20) > 10, "killed before the checkpoint has its name"
    assert outcomes.count(30) > 10, "and after it"


def test_what_another_run_wrote_is_not_deleted(tmp_path: Path) -> None:
    foreign = checkpoints(tmp_path / "other", 10, 20, 30)
    store = checkpoints(tmp_path / "run", 15, keep_last=1)
    for iteration in (10, 20, 30):
        shutil.copytree(path_of(foreign.folder, iteration), path_of(store.folder, iteration))
    (store.folder / "iter_0000000005").mkdir()
    (store.folder / "notes.txt").write_text("mine")
    save(store, 40, 50)
    assert iterations_in(store.folder) == [5, 10, 20, 30, 50]
    assert (store.folder / "notes.txt").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    store = checkpoints(tmp_path / "run", 10, keep_last=1)
    elsewhere = tmp_path / "elsewhere"
    path_of(store.folder, 10).rename(elsewhere)
    path_of(store.folder, 10).symlink_to(elsewhere)
    save(store, 20, 30)
    assert sorted(os.listdir(elsewhere)) == sorted([*fmt.FILES, fmt.MANIFEST_FILE])


def test_without_the_run_id_nothing_is_known_as_own(tmp_path: Path) -> None:
    checkpoints(tmp_path, 10, 20)
    (tmp_path / "run_id").write_text("damaged")
    store = checkpoints(tmp_path, 30, 40, keep_last=1)
    assert iterations_in(tmp_path) == [10, 20, 40]
    assert len((tmp_path / "run_id").read_text().strip()) == 32
    assert store.newest_valid() is not None


def test_later_damaged_ones_do_not_push_out_the_one_resumed_from(tmp_path: Path) -> None:
    checkpoints(tmp_path, 100, 200, 300, keep_last=3)
    for iteration in (200, 300):
        flip(path_of(tmp_path, iteration) / fmt.MODEL_FILE)  # sizes as they were
    store = checkpoints(tmp_path, keep_last=2)
    found = store.newest_valid()
    assert found is not None
    assert found.iteration == 100
    save(store, 150)
    assert iterations_in(tmp_path) == [100, 150, 200, 300]
    save(store, 200)
    assert iterations_in(tmp_path) == [150, 200, 300]
    save(store, 300)
    assert iterations_in(tmp_path) == [200, 300]
    newest = store.newest_valid()
    assert newest is not None
    assert newest.iteration == 300


def test_a_truncated_one_does_not_count_as_one_of_the_last(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, 10, 20, keep_last=2)
    os.truncate(path_of(tmp_path, 20) / fmt.MODEL_FILE, 10)
    save(store, 30)
    assert iterations_in(tmp_path) == [10, 30]


def test_nothing_is_deleted_before_the_new_one_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = checkpoints(tmp_path, 10, keep_last=1, on_error="warn")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        save(store, 20)
    assert store.last_error is not None
    assert "Input/output error" in store.last_error
    assert names_in(tmp_path) == ["iter_0000000010", "run_id"]
    save(store, 20)
    assert iterations_in(tmp_path) == [20]


def test_killed_while_deleting_no_half_is_left_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = checkpoints(tmp_path, 10, keep_last=1)

    def killed(path: str, **_: object) -> None:
        os.unlink(os.path.join(path, fmt.MODEL_FILE))
        raise OSError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        save(store, 20)
    assert iterations_in(tmp_path) == [20]
    (left,) = scratch_in(tmp_path)
    assert left.startswith(".tmp-delete-iter_0000000010-")
    assert store.newest_valid() is not None
    assert scratch_in(tmp_path) == []


def test_what_cannot_be_deleted_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = checkpoints(tmp_path, 10, keep_last=1)

    def fail(path: str) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_retention, "_delete", fail)
    save(store, 20)
    assert store.last_error is None
    assert iterations_in(tmp_path) == [10, 20]
    assert "old checkpoints could not be deleted: [Errno 13] Permission denied" in caplog.text
