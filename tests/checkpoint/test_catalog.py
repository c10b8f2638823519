"""Checkpoints are found newest first; what the dead left goes, what the living do stays."""

import os
import shutil
from pathlib import Path

import pytest
from checkpoint_cases import checkpoints, path_of, scratch_in

from distrain.checkpoint import format as fmt
from distrain.checkpoint.catalog import clear_leftovers, describe, find_all, newest_valid
from distrain.checkpoint.scratch import lock, scratch_name


def test_what_a_live_writer_works_on_is_left_alone(tmp_path: Path) -> None:
    ours = tmp_path / scratch_name("iter_0000000100")
    dead = tmp_path / scratch_name("iter_0000000200")
    foreign = tmp_path / ".tmp-mine"
    for folder in (ours, dead, foreign):
        folder.mkdir()
        (folder / fmt.MANIFEST_FILE).write_text("")
    with (ours / fmt.MANIFEST_FILE).open("r+") as locked:
        lock(locked.fileno())
        clear_leftovers(tmp_path, patience_s=0.0)
        assert scratch_in(tmp_path) == sorted([ours.name, foreign.name])
    clear_leftovers(tmp_path)
    assert scratch_in(tmp_path) == [foreign.name]


def test_all_are_found_in_the_order_of_their_iterations(tmp_path: Path) -> None:
    checkpoints(tmp_path, 9, 100, 20)
    (tmp_path / "iter_10").mkdir()
    (tmp_path / scratch_name("iter_0000000030")).mkdir()
    assert find_all(tmp_path) == [path_of(tmp_path, iteration) for iteration in (9, 20, 100)]
    assert find_all(tmp_path / "run_id") == find_all(tmp_path / "nowhere") == []
    clear_leftovers(tmp_path / "nowhere")


def test_the_newest_valid_one_is_not_that_of_another_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints(tmp_path / "own", 10)
    checkpoints(tmp_path / "other", 20)
    shutil.copytree(path_of(tmp_path / "other", 20), path_of(tmp_path / "own", 20))
    found = newest_valid(tmp_path / "own")
    assert found is not None
    assert found.iteration == 10
    assert "iter_0000000020 was written by another run" in caplog.text
    (tmp_path / "own" / "run_id").unlink()  # then nothing is known of whose they are
    found = newest_valid(tmp_path / "own")
    assert found is not None
    assert found.iteration == 20


def test_what_a_damaged_manifest_says_is_not_believed(tmp_path: Path) -> None:
    checkpoints(tmp_path, 5)
    manifest = path_of(tmp_path, 5) / fmt.MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"world_size": 2', '"world_size": 3'))
    found = describe(path_of(tmp_path, 5))
    assert (found.iteration, found.valid, found.world_size, found.digests) == (5, False, 0, {})
    assert "does not match its own sha256" in found.why_not
    assert newest_valid(tmp_path) is None


def test_a_damaged_file_leaves_the_manifest_believed(tmp_path: Path) -> None:
    checkpoints(tmp_path, 5)
    os.truncate(path_of(tmp_path, 5) / fmt.MODEL_FILE, 0)
    found = describe(path_of(tmp_path, 5))
    assert (found.valid, found.world_size, len(found.digests)) == (False, 2, 6)


def test_a_copy_under_another_name_can_be_described(tmp_path: Path) -> None:
    checkpoints(tmp_path, 5)
    path_of(tmp_path, 5).rename(tmp_path / "my_copy")
    found = describe(tmp_path / "my_copy")
    assert (found.valid, found.iteration) == (True, 5)
