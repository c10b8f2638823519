"""The staging memory: reused, grown, pinned where there is a GPU."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import identical

from distrain.checkpoint import staging as staging_module
from distrain.checkpoint.encode import encode
from distrain.checkpoint.staging import ALIGNMENT, GRANULE, Staging, place, size_with_headroom
from distrain.checkpoint.store import CheckpointStore


@pytest.fixture
def staging() -> Iterator[Staging]:
    """Return an empty staging memory."""
    staging = Staging()
    yield staging
    staging.close()


def fill(staging: Staging, state: dict) -> dict:
    """Fill the memory and return the job as the writer process reads it."""
    offset, length = staging.fill(encode(state), {"iteration": 1})
    return dict(json.loads(os.pread(staging.fd, length, offset)))


def test_tensors_lie_where_the_job_says(staging: Staging) -> None:
    state = {"model": {"w": torch.arange(5)}, "rest": [np.arange(3.0), torch.eye(2).t()[:1]]}
    job = fill(staging, state)
    (model,), (array, row) = job["files"]["model.safetensors"], job["files"]["training.safetensors"]
    assert model[:3] == ["w", "I64", [5]]
    assert os.pread(staging.fd, model[4], model[3]) == torch.arange(5).numpy().tobytes()
    assert array[:3] == ["rest.0", "F64", [3]]
    assert os.pread(staging.fd, array[4], array[3]) == np.arange(3.0).tobytes()
    assert row[:3] == ["rest.1", "F32", [1, 2]]
    assert os.pread(staging.fd, row[4], row[3]) == np.float32([1, 0]).tobytes()
    assert all(entry[3] % ALIGNMENT == 0 for entry in (model, array, row))


def test_places_and_sizes_worked_by_hand() -> None:
    snapshot = encode({"a": [torch.zeros(1), torch.zeros(0), torch.zeros(17), torch.zeros(16)]})
    assert place(snapshot.tensors) == ([0, 64, 64, 192], 256)
    assert size_with_headroom(1) == GRANULE
    assert size_with_headroom(16 * GRANULE) == 17 * GRANULE


def test_the_memory_stays_where_it_is_until_it_is_too_small(staging: Staging) -> None:
    fill(staging, {"a": torch.zeros(1000)})
    address = staging._memory.data_ptr()
    fill(staging, {"a": torch.zeros(2000), "b": list(range(1000))})
    assert staging._memory.data_ptr() == address
    assert os.fstat(staging.fd).st_size == GRANULE
    large = torch.randn(GRANULE)
    job = fill(staging, {"a": large})
    assert 4 * GRANULE < os.fstat(staging.fd).st_size <= 5 * GRANULE
    ((*_, offset, size),) = job["files"]["training.safetensors"]
    assert os.pread(staging.fd, size, offset) == large.numpy().tobytes()


def test_what_lies_before_something_that_grows_is_not_looked_for_again(staging: Staging) -> None:
    weight = torch.arange(100.0)
    for length in (3, 40, 0, 7):
        job = fill(staging, {"w": weight, "history": np.arange(float(length)), "last": weight + 1})
        if length == 3:
            view = staging._views[0]
        assert staging._views[0] is view
        for (*_, offset, size), values in zip(
            sorted(job["files"]["training.safetensors"]),
            (np.arange(float(length)), weight.numpy() + 1, weight.numpy()),
            strict=True,
        ):
            assert os.pread(staging.fd, size, offset) == values.tobytes()
    job = fill(staging, {"w": weight})
    assert len(staging._views) == 1
    fill(staging, {"w": weight, "history": np.arange(3.0)})
    assert len(staging._views) == 2


def test_equal_places_with_other_dtypes_are_told_apart(staging: Staging) -> None:
    for tensor in (torch.ones(4), torch.ones(4, dtype=torch.int32), torch.ones(2, 2), None):
        state = {"a": torch.ones(4).numpy() if tensor is None else tensor}
        job = fill(staging, state)
        ((_, dtype, _, offset, size),) = job["files"]["training.safetensors"]
        kind = np.int32 if dtype == "I32" else np.float32
        assert np.frombuffer(os.pread(staging.fd, size, offset), kind).tolist() == [1] * 4


def test_pinned_memory_is_let_go_before_it_moves(
    staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("pin", address, size))
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unpin", address))
            return 0

    monkeypatch.setattr(staging_module, "_cudart", Runtime)
    fill(staging, {"a": torch.zeros(1)})
    address = staging._memory.data_ptr()
    staging._pin()
    fill(staging, {"a": torch.zeros(GRANULE)})
    assert calls == [("pin", address, GRANULE), ("unpin", address)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_from_a_gpu_and_back(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 4, 5, device="cuda").contiguous(memory_format=torch.channels_last)
    state = {"model": {"w": weight, "b": torch.randn(7, device="cuda")}, "rng": torch.ones(2)}
    store = CheckpointStore(tmp_path)
    for iteration in (1, 2):
        store.save(iteration, state, world_size=1)
        assert store._staging is not None
        assert store._staging._pinned
        weight.mul_(2)
        assert store.wait()
    loaded = store.load(2, map_location="cuda")
    assert torch.equal(loaded["model"]["w"], weight / 2)
    assert loaded["model"]["w"].is_contiguous(memory_format=torch.channels_last)
    assert identical(store.load(2)["model"]["b"], state["model"]["b"].cpu())
    store.close()
