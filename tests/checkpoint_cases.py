"""What the tests of checkpoints share: states, exact equality, and ways to do harm."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distrain.checkpoint import format as fmt
from distrain.checkpoint import writer_client
from distrain.checkpoint.encode import encode
from distrain.checkpoint.retention import read_best
from distrain.checkpoint.store import CheckpointStore
from distrain.checkpoint.writer_client import Request
from distrain.checkpoint.writer_process import perform


def bytes_of(source: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, (nbytes,), on the host."""
    if isinstance(source, np.ndarray):
        return source
    dense = source.cpu().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # a dimension of size 1 may have any stride
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array


def identical(a: Any, b: Any) -> bool:
    """Say whether two states are the same to the last bit, types and order included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        return same and raw(a) == raw(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes())
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.resolve_conj().resolve_neg().view(torch.uint8).numpy().tobytes()


def state_digests(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each part of a state, as in the manifest of its checkpoint."""
    snapshot = encode(state)
    hashes = {(t.file, t.name): hashlib.sha256(bytes_of(t.source).data) for t in snapshot.tensors}
    return fmt.part_digests(snapshot.tree, lambda file, name: hashes[file, name].hexdigest())


def small_state(seed: int = 0) -> dict[str, Any]:
    """Return a state with something of everything, 30 KB."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    model(torch.randn(4, 30)).sum().backward()
    optimizer.step()
    schedule.step()
    values = np.linspace(0, seed, 100)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": (3, tuple(range(625)), None)},
        "hooks": {"best": {"metric": float("-inf"), "iteration": None}},
        "histories": {"loss": {"values": values, "iterations": np.arange(100)}},
    }


class InlineWriter:
    """Stands for the writer process; runs requests in this process, where tests can patch them."""

    def __init__(self, staging_fd: int) -> None:
        self._staging_fd = staging_fd
        self._answers: list[dict[str, Any]] = []

    def send(self, request: dict[str, Any]) -> None:
        self._answers.append(perform(request, self._staging_fd))

    def receive(self, *, wait_s: float | None) -> dict[str, Any]:
        return self._answers.pop(0)

    def close(self) -> None:
        pass


class InlineStore(CheckpointStore):
    """A store without a writer process, whose saves are done when they return."""

    def _send(self, request: Request) -> None:
        with mock.patch.object(writer_client, "WriterProcess", InlineWriter):
            super()._send(request)


def checkpoints(folder: Path, *iterations: int, **options: Any) -> CheckpointStore:
    """Return a store with a checkpoint of `small_state(iteration)` for each iteration."""
    store = InlineStore(folder, **{"on_error": "raise", "keep_last": 100, **options})
    for iteration in iterations:
        store.save(iteration, small_state(iteration), world_size=2)
    return store


def best_of(store: CheckpointStore) -> dict[str, tuple[int, float]]:
    """Return iteration and value of the best checkpoint by each metric's name."""
    best = read_best(str(store.folder))
    return {name: (one["iteration"], one["metric"]) for name, one in best.items()}


def path_of(folder: Path, iteration: int) -> Path:
    return folder / fmt.folder_name(iteration)


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def iterations_in(folder: Path) -> list[int]:
    return sorted(n for n in map(fmt.iteration_of, os.listdir(folder)) if n is not None)


def scratch_in(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.startswith(".tmp")]


def forge(path: Path, **files: bytes) -> None:
    """Put other bytes into files of a checkpoint, with a manifest that fits them.

    The keywords are the files' names up to the dot: model, training, state.
    """
    manifest = fmt.read_manifest(str(path))
    for stem, data in files.items():
        name = next(name for name in fmt.FILES if name.startswith(stem))
        (path / name).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"][name] = entry
    (path / fmt.MANIFEST_FILE).write_bytes(fmt.render_manifest(manifest))


def forge_tree(path: Path, node: Any) -> None:
    """Put a JSON value in the place of the part "hooks", with files that fit."""
    tree = json.loads((path / fmt.STATE_FILE).read_text())
    forge(path, state=json.dumps({**tree, "hooks": node}).encode())
