"""The writer process: killed, orphaned, signalled; never a half checkpoint, never a leftover."""

import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from checkpoint_cases import checkpoints, iterations_in, path_of, scratch_in, small_state
from safetensors.torch import load

from distrain.checkpoint import format as fmt
from distrain.checkpoint.store import CheckpointStore, SaveFailed, describe
from distrain.checkpoint.writer_process import IGNORED_SIGNALS

pytestmark = pytest.mark.ranks


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    """Return an empty store that writes in the background; no process may be left behind."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    yield store
    store.close()
    assert psutil.Process().children() == []


def writer() -> psutil.Process:
    """Return the writer process of the only store."""
    (process,) = psutil.Process().children()
    return process


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that does some work, and return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen; the limit only ends a test that fails."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    """Say whether a process ended; whoever inherited it may take its time to notice."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def kill(process: psutil.Process) -> None:
    """Kill a process and wait for its end, before which its pipes accept a next request."""
    process.kill()
    until(lambda: has_ended(process))


def filled(iteration: int, size: int = 500_000) -> dict:
    return {"model": {"w": torch.full((size,), float(iteration))}}


def test_the_writer_is_a_small_process_without_torch(store: CheckpointStore) -> None:
    store.save(1, small_state(), world_size=1)
    assert store.wait()
    maps = Path(f"/proc/{writer().pid}/maps").read_text()
    assert "python" in maps
    assert "torch" not in maps
    assert "numpy" not in maps
    assert writer().nice() > psutil.Process().nice()


def test_signals_meant_for_training_do_not_end_it(store: CheckpointStore) -> None:
    store.reserve(small_state())  # it is only just starting
    pid = writer().pid
    for number in IGNORED_SIGNALS:
        os.kill(pid, number)
    store.save(1, filled(1), world_size=1)
    for number in IGNORED_SIGNALS:
        os.kill(pid, number)
    assert store.wait()
    assert writer().pid == pid


def test_it_has_its_own_session(store: CheckpointStore) -> None:
    store.save(1, small_state(), world_size=1)
    assert os.getsid(writer().pid) == writer().pid


def test_killed_while_idle_it_starts_again(store: CheckpointStore) -> None:
    store.save(1, small_state(1), world_size=1)
    assert store.wait()
    kill(writer())
    store.save(2, small_state(2), world_size=1)
    assert store.wait()
    assert iterations_in(store.folder) == [1, 2]


def test_killed_while_saving_the_failure_is_reported(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints(store.folder, 1).close()
    store.reserve(filled(2))
    assert store.wait()
    stopped = writer()
    stopped.suspend()  # so that the save cannot have finished before the kill
    store.save(2, filled(2), world_size=1)
    stopped.kill()
    assert not store.wait()
    assert "was killed by signal 9" in str(store.last_error)
    assert len(caplog.records) == 1
    store.save(3, filled(3), world_size=1)
    assert store.wait()
    assert iterations_in(store.folder) == [1, 3]
    assert scratch_in(store.folder) == []


def test_killed_at_random_moments_of_a_save_loop(store: CheckpointStore) -> None:
    draw = random.Random(1)
    saved = 0
    for iteration in range(1, 41):
        store.save(iteration, filled(iteration), world_size=1)
        if iteration % 2:
            saved += store.wait()
        else:
            time.sleep(draw.uniform(0, 0.02))
            kill(writer())
            store.wait()
            assert len(scratch_in(store.folder)) == 0
        found = store.newest_valid()
        assert found is not None
        assert found.iteration in (iteration, iteration - 1)
        values = store.load(found.iteration)["model"]["w"]
        assert torch.equal(values, torch.full((500_000,), float(found.iteration)))
    assert saved == 20


def test_trainer_and_writer_killed_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(2)
    leftovers = sum(kill_a_run(tmp_path / "checkpoints", draw.uniform(0, 0.03)) for _ in range(15))
    assert leftovers  # or the kills hit nothing


def kill_a_run(folder: Path, delay_s: float) -> int:
    """Kill a run and its writer, resume, and return how much was left behind until then."""
    first = max(iterations_in(folder), default=0) + 1 if folder.exists() else 1

    def train() -> None:
        store = CheckpointStore(folder, keep_last=2)
        for iteration in range(first, first + 10_000):
            store.save(iteration, filled(iteration), world_size=1)

    pid = in_child(train)
    until(lambda: folder.exists() and iterations_in(folder)[-1:] >= [first])
    time.sleep(delay_s)
    processes = [*psutil.Process(pid).children(), psutil.Process(pid)]
    for process in processes:  # the writer first, so that it is in the middle of something
        process.kill()
    os.waitpid(pid, 0)
    until(lambda: all(map(has_ended, processes)))
    leftovers = len(scratch_in(folder))
    assert leftovers <= 1
    store = CheckpointStore(folder)
    found = store.newest_valid()
    assert found is not None
    assert found.iteration >= first
    assert scratch_in(folder) == []
    values = store.load(found.iteration)["model"]["w"]
    assert torch.equal(values, torch.full((500_000,), float(found.iteration)))
    return leftovers


def test_an_orphan_finishes_its_save_and_the_next_run_waits_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def train() -> None:
        store = CheckpointStore(folder)
        store.save(1, filled(1), world_size=1)
        store.wait()
        store.save(2, filled(2, size=10_000_000), world_size=1)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(train)
    until(lambda: folder.exists() and bool(iterations_in(folder)))
    (process,) = psutil.Process(pid).children()
    os.waitpid(pid, 0)
    until(lambda: bool(scratch_in(folder)) or iterations_in(folder) == [1, 2])
    found = CheckpointStore(folder).newest_valid()
    assert found is not None
    assert found.iteration == 2
    until(lambda: has_ended(process))
    assert scratch_in(folder) == []


def test_an_idle_orphan_ends_though_others_hold_its_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    reader, sender = os.pipe()

    def train() -> None:
        store = CheckpointStore(folder)
        store.save(1, filled(1), world_size=1)
        store.wait()
        (process,) = psutil.Process().children()
        loader = in_child(lambda: time.sleep(600))  # a loader worker, forked after the writer
        os.write(sender, struct.pack("ii", process.pid, loader))
        os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(train)
    writer_pid, loader_pid = struct.unpack("ii", os.read(reader, 8))
    os.waitpid(pid, 0)
    try:
        until(lambda: not psutil.pid_exists(writer_pid) or has_ended(psutil.Process(writer_pid)))
        assert psutil.pid_exists(loader_pid)
    finally:
        os.kill(loader_pid, signal.SIGKILL)
        os.close(reader)
        os.close(sender)


def test_the_files_follow_the_safetensors_layout(tmp_path: Path) -> None:
    state = {
        "model": {
            "byte": torch.ones(3, dtype=torch.uint8),
            "double": torch.ones(2, 2, dtype=torch.float64),
            "none": torch.ones(0, 5),
            "half": torch.tensor(1.0, dtype=torch.bfloat16),
        }
    }
    store = checkpoints(tmp_path)
    store.save(1, state, world_size=1)
    data = (path_of(tmp_path, 1) / fmt.MODEL_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    # wide elements first, so that each begins at a multiple of its size
    assert header == {
        "double": {"dtype": "F64", "shape": [2, 2], "data_offsets": [0, 32]},
        "half": {"dtype": "BF16", "shape": [], "data_offsets": [32, 34]},
        "byte": {"dtype": "U8", "shape": [3], "data_offsets": [34, 37]},
        "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [37, 37]},
    }
    assert len(data) == 8 + size + 37
    assert torch.equal(load(data)["double"], state["model"]["double"])
    empty = (path_of(tmp_path, 1) / fmt.TRAINING_FILE).read_bytes()
    assert load(empty) == {}


def test_a_file_that_no_program_could_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrain.checkpoint.writer_process.MAX_HEADER_BYTES", 10_000)
    store = checkpoints(tmp_path, 10)
    with pytest.raises(
        SaveFailed, match="model.safetensors: 200 tensors need a header of .* bytes"
    ):
        store.save(20, {"model": {str(i): torch.ones(1) for i in range(200)}}, world_size=1)
    assert iterations_in(tmp_path) == [10]


def test_two_stores_write_the_same_bytes(tmp_path: Path) -> None:
    one, two = checkpoints(tmp_path / "a", 5), checkpoints(tmp_path / "b", 5)
    for name in fmt.FILES:
        left, right = (path_of(store.folder, 5) / name for store in (one, two))
        assert left.read_bytes() == right.read_bytes()
    assert describe(path_of(one.folder, 5)).digests == describe(path_of(two.folder, 5)).digests
