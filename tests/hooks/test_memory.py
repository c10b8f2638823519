"""Memory of the host and of CUDA's allocator, over ranks and when it is full."""

import logging
import mmap

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import Trainer
from distrain.hooks import CallbackHook, TorchMemoryStats
from distrain.hooks.memory import fragmentation_hint, host_rss_bytes

STATS = {
    "allocated_bytes.all.current": 3 * 2**20,
    "allocated_bytes.all.peak": 5 * 2**20,
    "reserved_bytes.all.current": 8 * 2**20,
    "reserved_bytes.all.peak": 9 * 2**20,
    "inactive_split_bytes.all.current": 2**19,
    "num_alloc_retries": 4,
    "num_ooms": 1,
}
SCALARS = {
    "memory/allocated_mib": 3.0,
    "memory/allocated_peak_mib": 5.0,
    "memory/reserved_mib": 8.0,
    "memory/reserved_peak_mib": 9.0,
    "memory/inactive_split_mib": 0.5,
    "memory/alloc_retries": 4.0,
}


def trainer(*hooks):
    model = nn.Linear(3, 1, bias=False)
    model.forward = lambda batch: (batch @ model.weight.T).square().mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = [TorchMemoryStats(), *hooks]
    return Trainer(model, optimizer, [torch.ones(4, 3)], hooks=hooks, window=2)


def train(rank):
    ballast = np.ones(256 * 2**17) if rank == 1 else None  # 256 MiB, touched
    run = trainer()
    run.train(0, 5)
    assert ballast is None or ballast[0]
    own = host_rss_bytes() / 2**20
    return own, run.storage.history("memory/host_rss_mib").values()


@pytest.mark.ranks
def test_host_memory_is_that_of_the_largest_rank():
    (small, first), (large, second) = run_ranks(train, 2)
    assert first == second
    assert [iteration for _, iteration in first] == [1, 3, 4]
    assert large > small + 128  # two idle ranks already differ by tens of MiB
    assert first[-1][0] == pytest.approx(large, abs=16)


def test_a_process_grows_by_what_it_touches():
    before = host_rss_bytes()
    with mmap.mmap(-1, 32 * 2**20) as block:  # an array may get pages that the process has already
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert host_rss_bytes() - before == pytest.approx(len(block), rel=0.2)


def test_fragmentation():
    assert fragmentation_hint(STATS) == ""
    stats = STATS | {"inactive_split_bytes.all.current": 4 * 2**20}
    assert "4 MiB are free, but in pieces" in fragmentation_hint(stats)
    assert fragmentation_hint({}) == ""


@pytest.mark.parametrize(
    ("stats", "scalars"),
    [(STATS, SCALARS), ({"num_alloc_retries": 1}, {"memory/alloc_retries": 1.0})],
)
def test_on_cuda_the_allocator_is_asked(stats, scalars, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    run = trainer(CallbackHook(before_train=lambda t: setattr(hook, "_on_cuda", True)))
    hook = run.hooks["TorchMemoryStats"]
    run.train(0, 2)
    assert {n: h.latest() for n, h in run.storage.histories().items() if n in SCALARS} == scalars


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyError("another")])
def test_a_full_gpu_leaves_the_table_and_a_hint(error, monkeypatch, caplog):
    def fill(trainer):
        hook._on_cuda = True
        raise error

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: STATS)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: "| the table |")
    monkeypatch.setattr(logging.getLogger("distrain"), "propagate", True)
    run = trainer(CallbackHook(before_step=fill))
    hook = run.hooks["TorchMemoryStats"]
    with pytest.raises(type(error)):
        run.train(0, 2)
    if isinstance(error, KeyError):
        assert caplog.text == ""
        return
    assert "out of memory on rank 0" in caplog.text
    assert "trainer.accumulation=2" in caplog.text
    assert "| the table |" in caplog.text
