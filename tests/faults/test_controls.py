"""What happens without the guards: negative controls that plain Python and PyTorch give.

Each stands in tests/faults/README.md beside the test of the guard.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

SAVES = """
import sys, torch
state = {"weight": torch.zeros(50_000_000 // 4)}
while True:
    torch.save(state, sys.argv[1])
"""


def test_torch_save_alone_leaves_a_torn_file(tmp_path):
    path = tmp_path / "last.pt"
    whole = 50_000_000
    process = subprocess.Popen([sys.executable, "-c", SAVES, str(path)])
    try:
        while True:
            assert process.poll() is None
            with contextlib.suppress(FileNotFoundError):
                if 0 < path.stat().st_size < whole:
                    process.send_signal(signal.SIGSTOP)
                    if 0 < path.stat().st_size < whole:
                        break
                    process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(RuntimeError, match="failed finding central directory"):
        torch.load(path, weights_only=True)


PARENT = """
import multiprocessing, sys, time
child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_plain_child_outlives_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    try:
        time.sleep(0.5)
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_worker_of_a_plain_loader_ends_with_the_signal_of_a_cluster():
    loader = DataLoader(TensorDataset(torch.arange(1000)), num_workers=1)
    batches = iter(loader)
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGTERM)
    with pytest.raises((RuntimeError, OSError, EOFError)):  # told, or met at the next batch
        for _ in batches:
            pass


def act_on_a_signal_at_once(rank):
    """Train, and stop at the iteration in which this rank is asked to."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    asked = []
    signal.signal(signal.SIGUSR2, lambda *_: asked.append(True))
    for iteration in range(10):
        if rank == 1 and iteration == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        if asked:
            return iteration
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            return str(error)
    return "all ten"


@pytest.mark.ranks
def test_a_stop_that_is_not_agreed_leaves_the_others_in_a_collective():
    waiting, stopped = run_ranks(act_on_a_signal_at_once, 2)
    assert stopped == 5
    assert any(word in waiting for word in ("Timed out", "Connection closed", "timeout")), waiting


def test_a_plain_loader_repeats_samples_after_a_resume():
    data = TensorDataset(torch.arange(100))

    def samples(num):
        loader = DataLoader(data, sampler=RandomSampler(data), batch_size=10)
        return [int(x) for (batch,) in islice(loader, num) for x in batch]

    torch.manual_seed(0)
    first = samples(5)
    torch.manual_seed(0)  # the process that resumes begins as the first did
    assert set(samples(5)) == set(first)
