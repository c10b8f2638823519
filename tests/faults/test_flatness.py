"""Memory and file handles stay flat in a few thousand steps, and a leak would be seen."""

import gc
import os
import time
import tracemalloc

import flatness
import pytest
import torch
from flatness import Growth, Sample
from ranks import run_ranks
from torch import nn

from distrain import HookBase, Trainer
from distrain.checkpoint.store import CheckpointStore
from distrain.events.history import HistoryBuffer
from distrain.hooks import (
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
    ReplicaGuard,
)
from distrain.schedule.schedules import WarmupCosineLR

WARM, QUIET, END = 300, 600, 750  # iterations
HISTORY = 100


class Leak(HookBase):
    """Keeps 64 bytes and more an iteration, and a file every 50, from iteration QUIET on."""

    def before_train(self):
        self.kept = []

    def after_step(self):
        if self.trainer.iter >= QUIET:
            self.kept.append(b"x" * 64 + bytes(self.trainer.iter % 7))
            if self.trainer.iter % 50 == 0:
                self.kept.append(os.open(os.devnull, os.O_RDONLY))


class Watch(HookBase):
    """Notes how many bytes Python has allocated and how many files are open."""

    order = 95

    def before_train(self):
        self.seen = {}

    def after_step(self):
        if self.trainer.iter_done in (WARM, QUIET, END):
            self.settle()
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
            self.seen[self.trainer.iter_done] = size, len(os.listdir("/proc/self/fd"))

    def settle(self):
        """Let all that waits be combined, folded and written: it is no leak."""
        self.trainer.reduction.drain(self.trainer.iter)
        self.trainer.storage.histories()
        hook = self.trainer.hooks["PeriodicWriter"]
        hook.after_step()
        if hook._writer is not None:
            while not hook._writer._files._items.empty():
                time.sleep(0.01)
            time.sleep(0.2)  # the thread has taken the last row


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, x):
        return self.net(x).square().mean()


def watched(rank, folder):
    """Train with all default hooks; return what was seen at the three iterations."""
    HistoryBuffer.__init__.__defaults__ = (HISTORY,)
    tracemalloc.start()
    model = Square()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooks = [
        IterationTimer(),
        LRScheduler(WarmupCosineLR(optimizer, END)),
        ReplicaGuard(period=100),
        EvalHook(100, function=lambda: {"score": 1.0}),
        PeriodicCheckpointer(period=100, checkpoints=CheckpointStore(folder, keep_last=2)),
        PeriodicWriter(run_dir=str(folder.parent)),
        Leak(),
        watch := Watch(),
    ]
    data = [torch.ones(2, 1)]
    Trainer(model, optimizer, data, window=10, clip_norm=1.0, nonfinite="skip", hooks=hooks).train(
        0, END
    )
    return watch.seen


@pytest.mark.ranks
def test_flat_and_a_leak_is_seen(tmp_path):
    for rank, seen in enumerate(run_ranks(watched, 2, tmp_path / "checkpoints")):
        (warm, warm_files), (quiet, quiet_files), (end, end_files) = seen.values()
        assert quiet - warm < 32 * (QUIET - WARM), f"rank {rank}: {seen}"
        assert quiet_files == warm_files
        # the negative control: less than the hook's own bytes would not do
        assert end - quiet > 64 * (END - QUIET), f"rank {rank}: {seen}"
        assert end_files == quiet_files + 3


def test_growth_by_hand():
    samples = [Sample(at, mb, fds) for at, mb, fds in [
        (-1, 50.0, 9), (90, 300.0, 3), (110, 100.0, 5), (140, 101.0, 6), (150, 102.5, 7),
        (199, 99.0, 6),
    ]]  # fmt: skip
    found = flatness.growth(samples, warmup=100, iterations=200)
    assert found == Growth(uss_mb=1.5, num_fds=1, most_mb=300.0)
    assert not found.is_flat
    assert Growth(4.9, 0, 300.0).is_flat
    assert not Growth(5.0, 0, 300.0).is_flat
    with pytest.raises(ValueError, match="0 and 2 samples"):
        flatness.growth(samples, warmup=145, iterations=155)
