"""The manifest vouches for itself and for the files; the digests are worked out by hand."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from checkpoint_cases import checkpoints, path_of

from distrain.checkpoint import format as fmt
from distrain.checkpoint.format import CheckpointDamaged, part_digests, read_manifest, verify


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """Return the folder of a valid checkpoint."""
    checkpoints(tmp_path, 100).close()
    return path_of(tmp_path, 100)


def test_names() -> None:
    assert fmt.folder_name(100) == "iter_0000000100"
    assert fmt.iteration_of("iter_0000000100") == 100
    assert fmt.iteration_of(fmt.folder_name(12_345_678_901)) == 12_345_678_901
    for name in ("iter_100", "iter_0000000100.damaged-1a2b3c", "iter_0000000100\n", "run_id"):
        assert fmt.iteration_of(name) is None


def test_the_manifest_says_what_the_checkpoint_holds(one: Path) -> None:
    manifest = verify(str(one))
    assert (manifest["iteration"], manifest["world_size"]) == (100, 2)
    assert sorted(os.listdir(one)) == sorted([*fmt.FILES, fmt.MANIFEST_FILE])
    for name, entry in manifest["files"].items():
        data = (one / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert list(manifest["parts"]) == [
        *("model", "optimizer", "schedule", "rng", "hooks", "histories"),
    ]


def test_the_state_file_has_one_part_a_line(one: Path) -> None:
    lines = (one / fmt.STATE_FILE).read_text().splitlines()
    assert len(lines) == 2 + 6
    assert lines[5] == (
        '"hooks": {"best": {"metric": {"$float": "fff0000000000000"}, "iteration": null}},'
    )


def test_every_bit_of_the_manifest_counts(one: Path) -> None:
    path = one / fmt.MANIFEST_FILE
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            path.write_bytes(altered)
            with pytest.raises(CheckpointDamaged, match=fmt.MANIFEST_FILE):
                read_manifest(str(one))
    path.write_bytes(data)
    verify(str(one))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2; this distrain reads 1"),
        ({"format": "other"}, "not the manifest of a distrain checkpoint"),
        ({"iteration": "100"}, "'iteration' is missing or of the wrong type"),
        ({"world_size": True}, "'world_size' is missing or of the wrong type"),
        ({"files": {"../../etc/passwd": {}}}, r"names the files \['../../etc/passwd'\]"),
        ({"files": {"/etc/passwd": {}}}, r"names the files \['/etc/passwd'\]"),
        ({"files": {name: {} for name in fmt.FILES}}, "lacks its size or sha256"),
        ({"files": dict.fromkeys(fmt.FILES, 1)}, "lacks its size or sha256"),
        ({"parts": {"model": "abc"}}, "not a sha256"),
        ({"parts": {"model": None}}, "not a sha256"),
        ({"iteration": 99}, "holds iteration 99, not 100"),
    ],
)
def test_a_forged_manifest_is_refused(one: Path, change: dict, message: str) -> None:
    fields = {**read_manifest(str(one)), **change}
    data = fmt.render_manifest(fields)  # it fits its own sha256
    (one / fmt.MANIFEST_FILE).write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=message):
        verify(str(one))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 1e999}', b"9" * 5000]
)
def test_what_is_no_manifest_is_refused(one: Path, data: bytes) -> None:
    (one / fmt.MANIFEST_FILE).write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="manifest"):
        verify(str(one))


@pytest.mark.parametrize("name", [*fmt.FILES, fmt.MANIFEST_FILE])
def test_links_pipes_and_folders_in_place_of_files_are_refused(one: Path, name: str) -> None:
    path, elsewhere = one / name, one.parent / "elsewhere"
    path.rename(elsewhere)
    for make in (lambda: path.symlink_to(elsewhere), lambda: os.mkfifo(path)):
        make()
        with pytest.raises(CheckpointDamaged, match=name):
            verify(str(one))
        path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointDamaged, match=name):
        verify(str(one))
    path.rmdir()
    elsewhere.rename(path)
    verify(str(one))


def test_digests_worked_by_hand() -> None:
    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    tree = {
        "schedule": {"b": [1, 2.5], "a": None},
        "model": {"w": {"$tensor": "w", "dtype": "float32", "shape": [2], "order": [0]}},
        "hooks": {"$dict": [[2, "x"], [1, "y"]]},
        "histories": {"loss": 1, "perf/step_s": 2},
    }
    hashes = {("model.safetensors", "w"): "abc"}
    assert part_digests(tree, lambda file, name: hashes[file, name]) == {
        "schedule": sha256('{"a":null,"b":[1,2.5]}'),
        "model": sha256('{"w":{"$tensor":"abc","dtype":"float32","shape":[2]}}'),
        "hooks": sha256('{"$dict":[[1,"y"],[2,"x"]]}'),
        "histories": sha256('{"loss":1}'),
    }


def test_the_manifest_is_json_that_others_can_read(one: Path) -> None:
    fields = json.loads((one / fmt.MANIFEST_FILE).read_text())
    assert fields["format"] == "distrain checkpoint"
    rest = {k: v for k, v in fields.items() if k != "sha256"}
    assert fields["sha256"] == hashlib.sha256(json.dumps(rest).encode()).hexdigest()
