"""How batches are made: samples, generators, and processes that leave nothing behind."""

import contextlib
import multiprocessing
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from distrain.data import worker_process
from distrain.data.collate import Fetch, MicroBatch
from distrain.data.loader import EvalLoader, TrainLoader
from distrain.data.loader_errors import FILES_HINT, SHM_HINT
from distrain.data.loader_queue import LoaderQueue
from distrain.data.workers import WorkerBatches
from distrain.launch import failure

ITEM = MicroBatch(np.array([0, 0, 1]), np.array([4, 2, 0]))


class Told(Dataset[int]):
    """Does what it is told in a loader process."""

    def __init__(self, do: Callable[[int], Any] = lambda index: index) -> None:
        self.do = do

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.do(index)


def draw(index: int) -> Tensor:
    return torch.tensor([random.random(), np.random.randn(), torch.randn(()).item()])


def ended(pids: list[int], within_s: float = 10.0) -> bool:
    """Whether processes that are not our children are gone in time; if not, end them."""
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers_of(batches: Iterator[Any]) -> list[psutil.Process]:
    assert isinstance(batches, WorkerBatches)
    return [psutil.Process(worker.pid) for worker in batches._iterator._workers]


# samples to batches


def test_samples_are_collated_in_their_order() -> None:
    dataset = Told(lambda index: {"x": torch.tensor([index, index**2]), "name": str(index)})
    batch = Fetch(dataset, seed=None, collate=None)[ITEM]
    assert batch["x"].tolist() == [[4, 16], [2, 4], [0, 0]]
    assert batch["name"] == ["4", "2", "0"]


def test_a_collate_of_ones_own_gets_the_list_of_samples() -> None:
    assert Fetch(Told(), seed=1, collate=tuple)[ITEM] == (4, 2, 0)


def test_get_batch_gets_all_indices_at_once() -> None:
    class Whole:
        calls: list[Tensor] = []

        def __len__(self) -> int:
            return 6

        def get_batch(self, indices: Tensor) -> Tensor:
            self.calls.append(indices)
            return indices * 10

    for loader in (TrainLoader(Whole(), batch_size=6), EvalLoader(Whole(), batch_size=6)):
        batch = next(iter(loader.batches(0) if isinstance(loader, TrainLoader) else loader))
        assert sorted(batch.tolist()) == [0, 10, 20, 30, 40, 50]
    assert [call.dtype for call in Whole.calls] == [torch.int64] * 2


def test_get_batch_is_seeded_by_its_first_sample() -> None:
    class Whole(Told):
        def get_batch(self, indices: Tensor) -> Tensor:
            return draw(0)

    fetch = Fetch(Whole(), seed=1, collate=None)
    first, again = fetch[ITEM], fetch[ITEM]
    other = fetch[MicroBatch(ITEM.epochs + 1, ITEM.samples)]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tensors_in_memory_are_indexed_whole_with_the_same_result() -> None:
    dataset = TensorDataset(torch.randn(6, 2), torch.arange(6))
    fetch = Fetch(dataset, seed=1, collate=None)
    slow = default_collate([dataset[index] for index in ITEM.samples])
    fast = fetch[ITEM]
    assert type(fast) is type(slow)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))
    assert not fetch.draws
    # one collate of the user's, and it is asked for
    assert len(Fetch(dataset, seed=None, collate=lambda samples: samples)[ITEM]) == 3


def test_torchs_batched_protocol_is_used_where_samples_are_not_seeded() -> None:
    class Many(Told):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [index + 100 for index in indices]

    assert Fetch(Many(), seed=None, collate=None)[ITEM].tolist() == [104, 102, 100]
    assert Fetch(Many(), seed=1, collate=None)[ITEM].tolist() == [4, 2, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_is_named(workers: int) -> None:
    def fail(index: int) -> int:
        if index == 3:
            raise ValueError("damaged image")
        return index

    loader = TrainLoader(Told(fail), batch_size=6, workers=workers)
    with pytest.raises(ValueError, match="damaged image") as caught:
        next(loader.batches(0))
    said = f"{caught.value} {getattr(caught.value, '__notes__', '')}"
    assert "while loading sample 3 of Told" in said
    loader.close()


# random generators


def generators() -> list[Any]:
    _, words, position, has_gauss, gauss = np.random.get_state()
    return [
        random.getstate(),
        (words.tolist(), position, has_gauss, gauss),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed_samples", [True, False])
def test_the_training_process_draws_as_if_nothing_was_loaded(
    workers: int, seed_samples: bool
) -> None:
    dataset = Told(draw) if seed_samples else Told()
    np.random.randn()  # the second one of its pair waits inside the generator
    before = generators()
    loader = TrainLoader(dataset, batch_size=2, workers=workers, seed_samples=seed_samples)
    [*islice(loader.batches(0), 4)]
    [*EvalLoader(dataset, batch_size=4, workers=workers, seed_samples=seed_samples)]
    loader.close()
    assert generators() == before


def test_the_generators_come_back_when_a_sample_fails() -> None:
    def fail(index: int) -> None:
        draw(index)
        raise ValueError

    before = generators()
    with pytest.raises(ValueError):
        next(TrainLoader(Told(fail), batch_size=2).batches(0))
    assert generators() == before


def test_what_the_training_process_draws_changes_no_sample() -> None:
    first = [*islice(TrainLoader(Told(draw), batch_size=2).batches(0), 3)]
    mixed = []
    for batch in islice(TrainLoader(Told(draw), batch_size=2).batches(0), 3):
        mixed.append(batch)
        random.random(), np.random.rand(3), torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, mixed, strict=True))


@pytest.mark.ranks
def test_workers_of_unseeded_samples_draw_differently_by_rank_and_seed() -> None:
    drawn = []
    for rank, seed in [(0, 0), (1, 0), (0, 1)]:
        loader = TrainLoader(
            Told(draw),
            batch_size=2,
            rank=rank,
            world_size=2,
            seed=seed,
            workers=1,
            seed_samples=False,
        )
        drawn.append(tuple(next(loader.batches(0))[0].tolist()))
        loader.close()
    assert all(len({*column}) == 3 for column in zip(*drawn, strict=True))


# loader processes


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "has_thread"), [(3, False), (30_000, True)])
def test_small_items_are_sent_without_a_thread(size: int, has_thread: bool) -> None:
    items = [MicroBatch(np.zeros(size, int), np.arange(i, i + size) % 6) for i in range(8)]
    mixed = [*items[:4], ITEM, *items[4:]]  # a small item does not overtake a large one
    data = Told(lambda index: torch.full((1,), index))
    batches = WorkerBatches(Fetch(data, seed=None, collate=None), mixed, workers=1, seed=0)
    firsts = [int(next(batches)[0, 0]) for _ in mixed]
    assert firsts == [0, 1, 2, 3, 4, 4, 5, 0, 1]
    names = [thread.name for thread in threading.enumerate()]
    assert ("QueueFeederThread" in names) == has_thread, names
    batches.close()


@pytest.mark.ranks
def test_a_time_that_is_over_is_no_wait_without_end() -> None:
    # as in a process that is suspended between computing the rest of its wait and the wait
    ready = LoaderQueue(0, ctx=multiprocessing.get_context("fork"), rings=[])
    assert not ready._poll(-1.0)
    with pytest.raises(queue.Empty):
        ready.get(timeout=0)


def test_close_ends_them_at_once_and_the_loader_can_start_again() -> None:
    loader = TrainLoader(Told(), batch_size=2, workers=2)
    batches, others = loader.batches(0), loader.batches(5)
    processes = workers_of(batches) + workers_of(others)
    first = next(batches)
    loader.close()
    assert not any(process.is_running() for process in processes)
    with pytest.raises(RuntimeError, match="was closed"):
        next(batches)
    loader.close()
    assert torch.equal(next(loader.batches(0)), first)


@pytest.mark.ranks
def test_they_end_with_the_last_reference_to_their_batches() -> None:
    loader = TrainLoader(Told(), batch_size=2, workers=2)
    batches = loader.batches(0)
    processes = workers_of(batches)
    next(batches)
    del batches
    assert not any(process.is_running() for process in processes)

    for _batch in EvalLoader(Told(), batch_size=2, workers=2):
        assert len(psutil.Process().children()) == 2
        break  # and with an evaluation that is left half way
    assert not psutil.Process().children()


@pytest.mark.ranks
def test_one_that_hangs_in_a_sample_is_ended_too() -> None:
    loader = TrainLoader(Told(lambda index: time.sleep(1000)), batch_size=2, workers=2)
    loader.batches(0)  # abandoned at once
    batches = loader.batches(0)
    processes = workers_of(batches)
    time.sleep(0.2)
    loader.close()  # a second of grace for both
    assert not any(process.is_running() for process in processes)


@pytest.mark.ranks
@pytest.mark.parametrize("stuck", [1, 2])
def test_one_that_hangs_at_its_fork_is_forked_again(
    stuck: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As one does on a lock that another thread of the rank held at the fork."""
    for number in range(stuck):
        (tmp_path / str(number)).touch()

    def run(self: Any) -> None:
        for number in range(stuck):
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / str(number)).unlink()
                time.sleep(1000)
        ForkProcess.run(self)

    monkeypatch.setattr(worker_process._Worker, "run", run)
    monkeypatch.setattr(worker_process, "_START_S", 0.5)
    opened = len(os.listdir("/proc/self/fd"))
    loader = TrainLoader(Told(), batch_size=2, shuffle=False, workers=2)
    assert [batch.tolist() for batch in islice(loader.batches(0), 3)] == [[0, 1], [2, 3], [4, 5]]
    assert not [*tmp_path.iterdir()]
    assert sum("is forked again" in line for line in caplog.messages) >= stuck
    loader.close()
    assert len(os.listdir("/proc/self/fd")) == opened
    assert not psutil.Process().children()


def about_this_process(index: int) -> dict[str, int]:
    with open("/proc/self/status") as status:
        fields = dict(line.split(":\t", 1) for line in status)
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "ignored": int(fields["SigIgn"], 16),
        "blocked": int(fields["SigBlk"], 16),
    }


@pytest.mark.ranks
def test_they_ignore_what_a_cluster_sends_to_every_process() -> None:
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
    loader = TrainLoader(Told(about_this_process), batch_size=1, workers=1)
    batches = loader.batches(0)
    for process in workers_of(batches):  # perhaps before they have begun
        for number in numbers:
            process.send_signal(number)
    first = next(batches)
    assert first["threads"].item() == 1
    assert all(first["ignored"].item() >> (number - 1) & 1 for number in numbers)
    assert not any(first["blocked"].item() >> (number - 1) & 1 for number in numbers)
    for number in numbers:
        os.kill(first["pid"].item(), number)
    assert {batch["pid"].item() for batch in islice(batches, 6)} == {first["pid"].item()}
    loader.close()


@pytest.mark.ranks
def test_one_that_is_killed_is_an_error_of_the_rank() -> None:
    loader = TrainLoader(Told(), batch_size=2, workers=1)
    batches = loader.batches(0)
    next(batches)
    # torch may tell it first, in its handler of SIGCHLD, anywhere in the training process
    with pytest.raises(RuntimeError, match="loader process .* exit code -9|DataLoader worker"):
        workers_of(batches)[0].kill()
        [*islice(batches, 50)]
    loader.close()


@pytest.mark.ranks
@pytest.mark.parametrize("is_working", [True, False])
def test_none_outlives_a_rank_that_is_killed(is_working: bool) -> None:
    fork = multiprocessing.get_context("fork")
    read, write = fork.Pipe(duplex=False)

    def rank() -> None:
        loader = TrainLoader(
            Told(lambda index: time.sleep(1000 * is_working)), batch_size=2, workers=2
        )
        batches = loader.batches(0)
        write.send([process.pid for process in workers_of(batches)])
        time.sleep(1000)

    process = fork.Process(target=rank)
    process.start()
    pids = read.recv()
    assert all(alive(pid) for pid in pids)
    time.sleep(0.1 * is_working)
    process.kill()
    process.join()
    assert ended(pids)


SCRIPT = """
import time
from distrain.data.loader import TrainLoader

class Slow:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        time.sleep(1000 * (index == 3))
        return index

loader = TrainLoader(Slow(), batch_size=1, shuffle=False, workers=2)
batches = loader.batches(0)
print(next(batches).item())
print(*[worker.pid for worker in batches._iterator._workers])
"""


@pytest.mark.ranks
def test_a_script_that_forgets_them_ends_all_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )  # multiprocessing alone would wait for ever for processes that ignore SIGTERM
    sample, pids = done.stdout.splitlines()
    assert sample == "0"
    assert done.stderr == ""
    assert ended([int(pid) for pid in pids.split()])


class PhotoError(Exception):
    def __init__(self, path, line):  # cannot be unpickled: it gets one argument there
        super().__init__(f"{path}:{line}")


class Photos:
    def __init__(self, error):
        self._error = error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 7:
            raise self._error
        return torch.zeros(1)


class Unsendable:
    def __init__(self, error):
        self._error = error

    def __reduce__(self):
        raise self._error


FULL = "unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)"
MANY = (
    "unable to open shared memory object </torch_7_1> in read-write mode: Too many open files (24)"
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TypeError("cannot pickle it"), "TypeError: cannot pickle it ("),
        (RuntimeError(FULL), f"RuntimeError: {FULL} ({SHM_HINT}, "),
        (RuntimeError(MANY), f"RuntimeError: {MANY} ({FILES_HINT}, "),
    ],
)
def test_a_batch_that_cannot_be_sent_is_an_error_of_its_iteration(error, line):
    """Multiprocessing's thread that sends would print the error, and drop the batch."""
    fetch = Fetch(Told(lambda i: Unsendable(error) if i == 3 else i), seed=None, collate=list)
    plan = [MicroBatch(np.zeros(1, np.int64), np.array([i])) for i in range(4)]
    batches = WorkerBatches(fetch, plan, workers=2, pin_memory=False, seed=0)
    assert [next(batches) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(type(error)) as raised:
        next(batches)
    batches.close()
    said = failure.of_exception(raised.value, rank=1, log="x")
    assert said.text == line + "in DataLoader worker process 1)"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PhotoError("photo.jpg", 5), "PhotoError: photo.jpg:5 ("),
        (ValueError("no header\nmore"), "ValueError: no header ("),
        # of next() on an exhausted iterator; raised here it would end the loop over the batches
        (StopIteration("no more"), "StopIteration: no more ("),
        (
            RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"),
            "RuntimeError: unable to write to file </torch_7_1>: No space left on device (28) ("
            "/dev/shm is full: give the container more by --shm-size=8g or --ipc=host, or set "
            "data.workers=0, ",
        ),
    ],
)
def test_an_error_in_a_worker_begins_with_the_message_of_the_user(error, line):
    fetch = Fetch(Photos(error), seed=None, collate=None)
    plan = [MicroBatch(np.zeros(2, np.int64), np.array([i, i + 1])) for i in (0, 6)]
    batches = WorkerBatches(fetch, plan, workers=2, pin_memory=False, seed=0)
    assert next(batches).shape == (2, 1)
    with pytest.raises(type(error) if isinstance(error, ValueError) else RuntimeError) as raised:
        next(batches)
    batches.close()
    said = failure.of_exception(raised.value, rank=1, log="x")
    where = "in DataLoader worker process 1, while loading sample 7 of Photos)"
    assert said.text == line + where
    assert "in __getitem__" in said.trace  # where the user's code raised it
