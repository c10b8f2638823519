"""Checkpoint format: files, manifest, verification. Standard library only.

::

    iter_0000000100/            state after 100 finished iterations
        model.safetensors       tensors of the part "model" under their own names
        training.safetensors    all other tensors
        state.json              the nested rest, one part per line; refers to tensors by name
        manifest.json           content, with the sha256 of each file and part;
                                "best": metrics by name that were never better before;
                                "scores": by name, where the best n are kept: value, whether
                                larger is better, and n
    iter_0000000100.trained/    the same, while the end of the run (final evaluation, ...) is left;
                                deleted after the next save

The writer process imports this module; `pathlib` and `dataclasses` would double its start-up time
of 25 ms.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, TypeVar

from distrain.files.open_regular import open_regular
from distrain.files.retry import is_definite, retried
from distrain.scalar_names import NONDETERMINISTIC_PREFIXES

T = TypeVar("T")

FORMAT = "distrain checkpoint"
VERSION = 1
MODEL_FILE = "model.safetensors"
TRAINING_FILE = "training.safetensors"
STATE_FILE = "state.json"
FILES = (MODEL_FILE, TRAINING_FILE, STATE_FILE)
MANIFEST_FILE = "manifest.json"
TRAINED_SUFFIX = ".trained"
MODEL_PART = "model"
HISTORIES_PART = "histories"
MAX_MANIFEST_BYTES = 1 << 24

_FOLDER = re.compile(r"iter_(\d{10,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "iteration": int,
    "world_size": int,
    "created": str,
    "attempt": int,
    "best": dict,
    "run_id": str,
    "files": dict,
    "parts": dict,
}


class CheckpointDamaged(ValueError):
    """A checkpoint differs from what was written; the text has the file and the reason."""


def folder_name(iteration: int) -> str:
    """Return the folder name of a checkpoint: `folder_name(100)` is `iter_0000000100`."""
    return f"iter_{iteration:010d}"


def iteration_of(name: str) -> int | None:
    """Return the iteration in a checkpoint's folder name, None for other names."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def trained_iteration_of(name: str) -> int | None:
    """Return the iteration in a folder name with the suffix of a trained state, else None."""
    return iteration_of(name.removesuffix(TRAINED_SUFFIX)) if TRAINED_SUFFIX in name else None


def render_manifest(fields: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest; its last key is the sha256 of the others."""
    fields = {"format": FORMAT, "version": VERSION, **fields}
    fields["sha256"] = hashlib.sha256(json.dumps(fields, allow_nan=False).encode()).hexdigest()
    return json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n"


def read_manifest(path: str) -> dict[str, Any]:
    """Return the verified manifest of the checkpoint in folder `path`.

    Raises:
        CheckpointDamaged: it is missing, altered, of another version, or names unknown files.
        OSError: it cannot be read, after retries.
    """
    name = os.path.join(path, MANIFEST_FILE)
    return parse_manifest(_with_file(name, lambda file: file.read(MAX_MANIFEST_BYTES)), name)


def parse_manifest(raw: bytes, name: str) -> dict[str, Any]:
    """Return the verified manifest in the bytes of a file; `name` is the file's, for errors.

    Raises:
        CheckpointDamaged: it is altered, of another version, or names unknown files.
    """
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointDamaged(f"{name} is not valid JSON") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointDamaged(f"{name} is not the manifest of a distrain checkpoint")
    if fields.get("version") != VERSION:
        raise CheckpointDamaged(
            f"{name} has format version {fields.get('version')!r}; this distrain reads {VERSION}"
        )
    without_hash = {k: v for k, v in fields.items() if k not in ("format", "version", "sha256")}
    # rendered again, it shows every altered byte, white space included
    try:
        unaltered = render_manifest(without_hash) == raw
    except (ValueError, RecursionError):
        unaltered = False
    if not unaltered:
        raise CheckpointDamaged(f"{name} was altered: it does not match its own sha256")
    _check_fields(without_hash, name)
    return without_hash


def _check_fields(fields: dict[str, Any], name: str) -> None:
    """Raise CheckpointDamaged for a missing field, a wrong type or an unknown file."""
    for key, kind in _FIELDS.items():
        if not isinstance(fields.get(key), kind) or isinstance(fields.get(key), bool):
            raise CheckpointDamaged(f"{name}: field {key!r} is missing or of the wrong type")
    if sorted(fields["files"]) != sorted(FILES):
        raise CheckpointDamaged(
            f"{name} names the files {sorted(fields['files'])}; a checkpoint has {sorted(FILES)}"
        )
    for file, entry in fields["files"].items():
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("bytes"), int)
            or not _is_sha256(entry.get("sha256"))
        ):
            raise CheckpointDamaged(f"{name}: the entry of {file} lacks its size or sha256")
    if not all(isinstance(value, float | int) for value in fields["best"].values()):
        raise CheckpointDamaged(f"{name}: a metric of 'best' is not a number")
    scores = fields.get("scores", {})
    if not isinstance(scores, dict) or not all(map(_is_score, scores.values())):
        raise CheckpointDamaged(f"{name}: 'scores' is not value, larger_is_better and keep by name")
    if not all(_is_sha256(digest) for digest in fields["parts"].values()):
        raise CheckpointDamaged(f"{name}: a digest of 'parts' is not a sha256")


def _is_score(score: object) -> bool:
    if not isinstance(score, dict) or score.keys() != {"value", "larger_is_better", "keep"}:
        return False
    is_number = isinstance(score["value"], float | int)
    return is_number and isinstance(score["larger_is_better"], bool) and type(score["keep"]) is int


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def verify(path: str, *, contents: bool = True) -> dict[str, Any]:
    """Verify the checkpoint in folder `path`, with `contents` by every sha256; return its manifest.

    Raises:
        CheckpointDamaged: a file differs from the manifest.
        OSError: a file cannot be read, after retries.
    """
    manifest = read_manifest(path)
    expected = iteration_of(os.path.basename(os.path.abspath(path)))
    if expected not in (None, manifest["iteration"]):
        raise CheckpointDamaged(f"{path} holds iteration {manifest['iteration']}, not {expected}")
    for name, entry in manifest["files"].items():
        _check_file(os.path.join(path, name), entry, contents=contents)
    return manifest


def _check_file(path: str, entry: dict[str, Any], *, contents: bool) -> None:
    _with_file(path, lambda file: check_open_file(file, path, entry, contents=contents))


def check_open_file(
    file: BinaryIO, path: str, entry: dict[str, Any], *, contents: bool = True
) -> None:
    """Raise CheckpointDamaged if an open file differs from its manifest's entry; reads all of it.

    Without `contents`, only its size is compared. `path` is for the error.
    """
    size = os.fstat(file.fileno()).st_size
    if size != entry["bytes"]:
        raise CheckpointDamaged(f"{path} has {size} bytes, not {entry['bytes']}")
    digest = hashlib.sha256()
    while contents and (chunk := file.read(1 << 20)):
        digest.update(chunk)
    if contents and digest.hexdigest() != entry["sha256"]:
        raise CheckpointDamaged(f"{path} was altered: its sha256 is another")


def _with_file(path: str, use: Callable[[Any], T]) -> T:
    """Return `use(file)` of an open file, with retries."""

    def attempt() -> T:
        try:
            fd = open_regular(path, follow=False)
        except FileNotFoundError:
            raise CheckpointDamaged(f"{path} is missing") from None
        except OSError as error:
            if not is_definite(error):
                raise
            raise CheckpointDamaged(f"{path} is not a regular file") from error
        with open(fd, "rb") as file:
            try:
                return use(file)
            except OSError as error:
                error.filename = path
                raise

    return retried(attempt)


def part_digests(tree: dict[str, Any], sha256_of: Callable[[str, str], str]) -> dict[str, str]:
    """Return a sha256 digest of each part of a state, independent of the layout of its files.

    A digest is the sha256 of the part's tree as compact JSON with sorted keys, where every tensor
    is given by its dtype, shape and the sha256 of its bytes. The insertion order of dicts, the
    memory order of dimensions and, in the part "histories", names with one of
    `NONDETERMINISTIC_PREFIXES` do not count.

    Args:
        tree: parts by name, see `encode`.
        sha256_of: (file, name) -> sha256 of a tensor's bytes.
    """
    digests = {}
    for part, node in tree.items():
        file = MODEL_FILE if part == MODEL_PART else TRAINING_FILE
        if part == HISTORIES_PART:
            node = _without_nondeterministic(node)
        plain = _canonical(node, partial(sha256_of, file))
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digests[part] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def _without_nondeterministic(node: Any) -> Any:
    """Return the histories without timing and hardware metrics."""
    if not isinstance(node, dict):
        return node
    if "$dict" in node:
        return {"$dict": [[k, v] for k, v in node["$dict"] if not _is_nondeterministic(k)]}
    return {k: v for k, v in node.items() if not _is_nondeterministic(k)}


def _is_nondeterministic(name: object) -> bool:
    return isinstance(name, str) and name.startswith(NONDETERMINISTIC_PREFIXES)


def _canonical(node: Any, sha256_of: Callable[[str], str]) -> Any:
    """Return a node of the tree with tensors as hashes and pairs in a fixed order."""
    if isinstance(node, list):
        return [_canonical(child, sha256_of) for child in node]
    if not isinstance(node, dict):
        return node
    for tag in ("$tensor", "$array"):
        if tag in node:
            return {tag: sha256_of(node[tag]), "dtype": node["dtype"], "shape": node["shape"]}
    plain = {key: _canonical(child, sha256_of) for key, child in node.items()}
    for tag in ("$dict", "$counter"):
        if tag in plain:
            plain[tag].sort(key=json.dumps)
    return plain
