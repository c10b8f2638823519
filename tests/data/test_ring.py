"""Batches in reused shared memory: the same bits, and never written while they are in use."""

import collections
import gc
import multiprocessing
import os
import signal
import tempfile
import time
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

from distrain.data import ring
from distrain.data.loader import EvalLoader, TrainLoader

SIDE = 1 << 14  # floats per sample

Pair = collections.namedtuple("Pair", "image extra")


class Images(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        image = torch.full((SIDE,), float(index))
        others = {"half": image.half(), "flag": image > 3, "text": str(index)}
        return Pair(image, {**others, "numpy": np.full(3, index), "scalar": torch.tensor(index)})


class Given(Images):
    """Its batch is what `make` returns."""

    def __init__(self, make):
        self.make = make

    def get_batch(self, indices):
        return self.make(indices)


def loaded(dataset, number=12, workers=2, **kwargs):
    loader = TrainLoader(dataset, batch_size=8, workers=workers, seed=3, **kwargs)
    batches = loader.batches(0)
    yield from islice(batches, number)
    loader.close()


def flat(batch):
    """Return type, dtype, shape, strides and bytes of everything in a batch."""
    if isinstance(batch, torch.Tensor):
        if batch.requires_grad:
            return "requires_grad", flat(batch.detach())
        batch = batch.resolve_conj().resolve_neg()
        values = batch.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return type(batch), batch.dtype, batch.shape, batch.stride(), values
    if isinstance(batch, dict):
        return type(batch), [(key, flat(value)) for key, value in batch.items()]
    if isinstance(batch, (list, tuple)):
        return type(batch), [flat(value) for value in batch]
    return batch


@pytest.fixture
def received(monkeypatch):
    """The slots that batches came in."""
    slots = []
    receive = ring.Ring.receive

    def seen(self, sent):
        slots.append((sent.worker, sent.slot))
        return receive(self, sent)

    monkeypatch.setattr(ring.Ring, "receive", seen)
    return slots


def ragged(indices):
    size = int(indices[0]) + 1
    return {"x": torch.arange(float(size * SIDE)), "lengths": indices}


def shared(indices):
    base = torch.arange(float(2 * SIDE * len(indices)))
    return [base, base[:5], base.view(2, -1)]


def odd(indices):
    base = torch.randn(600, 600, generator=torch.Generator().manual_seed(int(indices[0])))
    types = [base.to(t) for t in (torch.bfloat16, torch.complex64, torch.int8, torch.float64)]
    return [*types, base.T, base.to_sparse().to_dense(), torch.empty(0, 4), base[:, 3], base[0, 0]]


def square(indices):
    # each has the address, the shape and the type of the first
    base = torch.arange(float(SIDE)).view(128, 128) + indices[0]
    return [base, base.T, base[:1].expand(128, 128), base]


def conjugate(indices):
    base = torch.complex(torch.ones(SIDE), torch.ones(SIDE)) * indices[0]
    return [base, base.conj(), base.conj().imag]


def with_gradient(indices):
    base = torch.arange(float(SIDE)) + indices[0]
    return {"plain": base, "leaf": base.detach().requires_grad_()}


CASES = {
    "default collate": (Images(), {}),
    "own collate": (Images(), {"collate": lambda samples: {"b": default_collate(samples)}}),
    "list of tensors": (Images(), {"collate": lambda samples: [s.image for s in samples]}),
    "ragged": (Given(ragged), {}),
    "shared storage": (Given(shared), {}),
    "types and strides": (Given(odd), {}),
    "views of one shape": (Given(square), {}),
    "gradient": (Given(with_gradient), {}),
    "conjugate": (Given(conjugate), {}),
    "no tensors": (Given(lambda indices: indices.tolist()), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_and_the_order_are_those_of_loading_here(case):
    dataset, kwargs = CASES[case]
    here = [flat(batch) for batch in loaded(dataset, workers=0, **kwargs)]
    assert [flat(batch) for batch in loaded(dataset, **kwargs)] == here  # each dropped at once
    kept = [*loaded(dataset, **kwargs)]
    assert [flat(batch) for batch in kept] == here


def test_a_slot_is_reused_only_after_the_last_reference_to_it(received):
    views = []
    weight = torch.ones(SIDE, requires_grad=True)
    for batch in loaded(Images(), 40, workers=1):
        # a view, an array, and a tensor that autograd has saved each hold the memory
        kinds = [
            lambda image: image[2:].view(-1)[::2],
            lambda image: image.numpy()[2:],
            lambda image: (image * weight).sum(),
        ]
        view = kinds[len(views) % 3](batch.image)
        expected = torch.as_tensor(batch.image.clone())
        views.append((view, expected))
        del batch, view
        gc.collect(1)
        for position, (held, was) in enumerate(views):
            if position % 3 == 0:
                assert torch.equal(held, was[2:].view(-1)[::2])
            elif position % 3 == 1:
                assert np.array_equal(held, was.numpy()[2:])
        if len(views) == 12:
            for position, (held, was) in enumerate(views):
                if position % 3 == 2:
                    weight.grad = None
                    held.backward()
                    assert torch.equal(weight.grad, was.sum(0))
            views.clear()
            del held, was
    # while all slots are held, torch's way; once they are dropped, they are used again
    assert len({slot for _, slot in received}) == ring.SLOTS
    assert ring.SLOTS * 2 < len(received) < 40


def test_few_slots_serve_a_loop_that_keeps_nothing(received):
    for batch in loaded(Images(), 40, workers=2):
        assert (batch.image[:, 0] == batch.image[:, -1]).all()
        del batch
    assert len(received) >= 40  # and those that are loaded ahead


def test_a_forked_process_that_drops_a_batch_frees_no_slot(received):
    batches = loaded(Images(), 30, workers=1)
    kept = [next(batches)]
    was = kept[0].image.clone()
    child = multiprocessing.get_context("fork").Process(target=kept.clear)
    child.start()
    child.join()
    for _ in batches:
        assert torch.equal(kept[0].image, was)
    assert received.count(received[0]) == 1


def test_evaluation_with_a_short_last_batch(received):
    def load(workers):
        loader = EvalLoader(Images(), batch_size=12, workers=workers)
        return [flat(batch) for batch in loader]

    assert load(2) == load(0)
    assert len(received) == 4


def test_tensors_that_share_memory_still_do(received):
    for base, start, rows in loaded(Given(shared)):
        base[0] = -1.0
        assert start[0] == rows[0, 0] == -1.0
    assert received == []


def jagged(indices):
    parts = [torch.full((SIDE,), float(indices[0])), torch.ones(3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def test_the_parts_of_a_tensor_that_consists_of_others_come_in_slots(received):
    here = [flat(batch.values()) for batch in loaded(Given(jagged), workers=0)]
    assert [flat(batch.values()) for batch in loaded(Given(jagged))] == here
    assert len(received) >= 12


def test_small_batches_need_no_file(received, monkeypatch):
    # torch's way makes a folder and a socket in it for each loader process, and an evaluation
    # starts new processes: its first batch would wait for the disk
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    small = Given(lambda indices: indices.clone())
    here = [flat(batch) for batch in loaded(small, workers=0)]
    assert [flat(batch) for batch in loaded(small)] == here
    assert len(received) >= 12


def test_small_ragged_batches_come_in_slots_whatever_the_first(received):
    sizes = [1, 5000, 3, 30_000, 1] * 8
    small = Given(lambda indices: torch.zeros(sizes[int(indices[0])]))
    for batch in loaded(small, 20):
        assert not batch.any()
        del batch
    assert len(received) >= 20


def too_large(indices):
    return torch.zeros((1 if indices[0] < 8 else 40) * SIDE)


def of_shared_parts(indices):
    other, base = torch.zeros(9, 9), torch.zeros(SIDE)
    # the first has a slot
    return [other.T, base] if indices[0] < 8 else [other.T, base, base[:9]]


@pytest.mark.parametrize("make", [too_large, of_shared_parts])
def test_a_loader_process_keeps_no_file_of_a_batch(make):
    loader = TrainLoader(Given(make), batch_size=8, workers=1, shuffle=False)
    batches = loader.batches(0)
    next(batches)
    (worker,) = batches._iterator._workers

    def num_files():
        return len(os.listdir(f"/proc/{worker.pid}/fd"))

    # torch's way opens files that the receiver of the batch has closed
    numbers = [(next(batches), num_files())[1] for _ in range(50)]
    assert min(numbers[-10:]) <= max(numbers[:10])
    loader.close()


@pytest.mark.parametrize("killed", ["worker", "rank"])
def test_nothing_is_left_in_shared_memory_after_a_kill(killed):
    before = {*os.listdir("/dev/shm")}
    fork = multiprocessing.get_context("fork")
    read, write = fork.Pipe(duplex=False)

    def rank():
        batches = TrainLoader(Images(), batch_size=8, workers=2).batches(0)
        # torch's way, which batches go while all slots are held, can leave a file
        next(batches)
        write.send([worker.pid for worker in batches._iterator._workers])
        try:
            while True:
                next(batches)
        except RuntimeError as error:
            write.send(str(error))

    process = fork.Process(target=rank)
    process.start()
    pids = read.recv()
    os.kill(pids[0] if killed == "worker" else process.pid, signal.SIGKILL)
    if killed == "worker":
        assert "exit code -9" in read.recv()
    process.join(20)
    deadline = time.monotonic() + 10
    # files of other programs come and go
    while any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids) or left_since(before):
        assert time.monotonic() < deadline, left_since(before)
        time.sleep(0.02)


def left_since(before):
    return {*os.listdir("/dev/shm")} - before
