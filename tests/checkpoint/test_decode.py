"""Damage of every class is found and the newest valid checkpoint used; nothing hostile runs."""

import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import checkpoints, forge, forge_tree, identical, path_of, small_state
from safetensors.torch import load_file, save

from distrain.checkpoint import format as fmt
from distrain.checkpoint.decode import load_checkpoint
from distrain.checkpoint.store import CheckpointDamaged, CheckpointStore, describe

ALL_FILES = (*fmt.FILES, fmt.MANIFEST_FILE)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Return a store with valid checkpoints of the iterations 100 and 200."""
    return checkpoints(tmp_path / "checkpoints", 100, 200)


def assert_found_out(store: CheckpointStore, file: str) -> None:
    """Check that 200 is known as damaged, with the file's name, and that 100 is used."""
    newest = path_of(store.folder, 200)
    found = describe(newest)
    assert not found.valid
    assert file in found.why_not
    with pytest.raises(CheckpointDamaged, match=file):
        store.load(200)
    chosen = store.newest_valid()
    assert chosen is not None
    assert chosen.iteration == 100


def test_what_was_saved_is_what_is_loaded(store: CheckpointStore) -> None:
    assert identical(store.load(200), small_state(200))
    assert identical(load_checkpoint(path_of(store.folder, 100)), small_state(100))
    found = store.newest_valid()
    assert found is not None
    assert (found.iteration, found.world_size, found.valid) == (200, 2, True)


def test_other_tools_open_the_model(store: CheckpointStore) -> None:
    model = load_file(path_of(store.folder, 200) / fmt.MODEL_FILE)
    assert identical(dict(sorted(model.items())), dict(sorted(small_state(200)["model"].items())))


def test_tensors_outlive_the_files(store: CheckpointStore) -> None:
    state = store.load(200)
    for name in fmt.FILES:
        os.truncate(path_of(store.folder, 200) / name, 0)
    assert identical(state, small_state(200))


@pytest.mark.parametrize("name", ALL_FILES)
def test_truncation_is_found(store: CheckpointStore, name: str) -> None:
    path = path_of(store.folder, 200) / name
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else 16
    for size in (0, 1, 8, header - 1, header, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert_found_out(store, name)
    path.write_bytes(data + b"\0")
    assert_found_out(store, name)


def test_200_bit_flips_are_found(store: CheckpointStore) -> None:
    draw = random.Random(0)
    folder = path_of(store.folder, 200)
    whole = {name: (folder / name).read_bytes() for name in ALL_FILES}
    for _ in range(200):
        name = draw.choice(ALL_FILES)
        altered = bytearray(whole[name])
        altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(altered)
        assert_found_out(store, name)
        (folder / name).write_bytes(whole[name])
    assert describe(folder).valid


def test_without_digests_a_flip_would_not_be_found(store: CheckpointStore) -> None:
    """The control: safetensors alone loads a flipped weight."""
    path = path_of(store.folder, 200) / fmt.MODEL_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    assert len(load_file(path)) == len(small_state()["model"])


def test_zeroed_pages_are_found(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, 100)
    store.save(200, {"model": {"w": torch.randn(50_000)}}, world_size=1)
    path = path_of(store.folder, 200) / fmt.MODEL_FILE
    data = path.read_bytes()
    for page in range(0, len(data) - 4096, 4096):
        path.write_bytes(data[:page] + bytes(4096) + data[page + 4096 :])
        assert_found_out(store, fmt.MODEL_FILE)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_found(store: CheckpointStore, name: str) -> None:
    (path_of(store.folder, 200) / name).unlink()
    assert_found_out(store, name)


def test_swapped_files_are_found(store: CheckpointStore) -> None:
    folder, other = path_of(store.folder, 200), path_of(store.folder, 100)
    pairs = [
        (folder / fmt.MODEL_FILE, folder / fmt.TRAINING_FILE),
        (folder / fmt.MODEL_FILE, store.folder / "old_model"),
    ]
    (store.folder / "old_model").write_bytes((other / fmt.MODEL_FILE).read_bytes())
    for left, right in pairs:
        one, two = left.read_bytes(), right.read_bytes()
        left.write_bytes(two)
        right.write_bytes(one)
        assert_found_out(store, fmt.MODEL_FILE)
        left.write_bytes(one)
        right.write_bytes(two)
    assert describe(folder).valid


def test_swapped_folders_are_found(store: CheckpointStore) -> None:
    old, new = path_of(store.folder, 100), path_of(store.folder, 200)
    old.rename(store.folder / "aside")
    new.rename(old)
    (store.folder / "aside").rename(new)
    assert "holds iteration 200, not 100" in describe(old).why_not
    assert store.newest_valid() is None


def test_a_damaged_one_is_named_in_a_warning(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(path_of(store.folder, 200) / fmt.STATE_FILE, 5)
    assert store.newest_valid() is not None
    (record,) = caplog.records
    assert "passed over" in record.message
    assert "iter_0000000200/state.json has 5 bytes, not" in record.message


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("stem", ["model", "training", "state"])
def test_a_pickle_does_not_run(store: CheckpointStore, tmp_path: Path, stem: str) -> None:
    flag = tmp_path / "flag"
    zipped = io.BytesIO()
    torch.save(Hostile(flag), zipped)
    for data in (pickle.dumps(Hostile(flag)), zipped.getvalue()):
        forge(path_of(store.folder, 200), **{stem: data})
        assert describe(path_of(store.folder, 200)).valid  # the forger made a manifest that fits
        with pytest.raises(
            CheckpointDamaged, match=stem if stem == "state" else "cannot be decoded"
        ):
            store.load(200)
    assert not flag.exists()
    pickle.loads(pickle.dumps(Hostile(flag)))  # the control: unpickled, it does run
    assert flag.exists()


@pytest.mark.parametrize(
    "node",
    [
        {"$unknown": 1},
        {"$tensor": "no such tensor", "dtype": "float32", "shape": [1]},
        {"$tensor": "../../x", "dtype": "float32", "shape": [1]},
        {"$tensor": "rng.torch", "dtype": "float32", "shape": [1]},
        {"$tensor": "rng.torch", "dtype": "no_such_dtype", "shape": [1]},
        {"$tensor": "rng.torch", "dtype": "uint8", "shape": [-1]},
        {"$tensor": "rng.torch", "dtype": "uint8", "shape": "x"},
        {"$tensor": "rng.torch", "dtype": "uint8"},
        {"$tensor": "histories.loss.values", "dtype": "float64", "shape": [100], "order": [7]},
        {"$tensor": "histories.loss.values", "dtype": "float64", "shape": [100], "order": [0, 0]},
        {"$tensor": "histories.loss.values", "dtype": "float64", "shape": [100], "extra": 1},
        {"$tensor": ["x"]},
        {"$array": "rng.torch", "dtype": "O", "shape": [1]},
        {"$array": "rng.torch", "dtype": "|O8", "shape": [1]},
        {"$array": "rng.torch", "dtype": "<f8", "shape": [1 << 62]},
        {"$scalar": "00", "dtype": "<f8"},
        {"$scalar": "zz", "dtype": "|u1"},
        {"$dict": [[[], 1]]},
        {"$dict": [1]},
        {"$dict": None},
        {"$ordered": [[1]]},
        {"$tuple": 5},
        {"$int": "12.5"},
        {"$float": "00"},
        {"$bytes": "%%"},
        {"$str": "/w=="},
    ],
)
def test_a_forged_tree_is_refused(store: CheckpointStore, node: Any) -> None:
    forge_tree(path_of(store.folder, 200), node)
    with pytest.raises(CheckpointDamaged, match="cannot be decoded|state.json"):
        store.load(200)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '"x"', '{"a":' * 100_000])
def test_a_forged_state_file_is_refused(store: CheckpointStore, text: str) -> None:
    forge(path_of(store.folder, 200), state=text.encode())
    with pytest.raises(CheckpointDamaged):
        store.load(200)


def test_a_forged_safetensors_header_is_refused(store: CheckpointStore) -> None:
    folder = path_of(store.folder, 200)
    good = save({"w": torch.ones(4)})
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    for offsets in ([0, 1 << 60], [-1, 16], [16, 0], [8, 24]):
        header["w"]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        forge(folder, model=len(text).to_bytes(8, "little") + text + good[8 + size :])
        with pytest.raises(CheckpointDamaged, match="cannot be decoded"):
            store.load(200)
    forge(folder, model=(1 << 63).to_bytes(8, "little") + good[8:])
    with pytest.raises(CheckpointDamaged, match="cannot be decoded"):
        store.load(200)


def test_a_missing_checkpoint_is_a_clear_error(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointDamaged, match=r"iter_0000000300/manifest\.json is missing"):
        store.load(300)


def test_arrays_come_back_writable(store: CheckpointStore) -> None:
    state = store.load(200)
    state["histories"]["loss"]["values"][0] = 1.0
    assert isinstance(state["histories"]["loss"]["values"], np.ndarray)
