"""One CUDA device: the step against plain PyTorch, what it waits for, and the command on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu import WARM_UP_STEPS, ForbidsSynchronisation, proves_it_would_raise
from benchmarks.ours import default_hooks
from distrain import HookBase, Trainer
from distrain.hooks import TorchMemoryStats
from distrain.trainer.numerics import numerics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
ROOT = Path(__file__).parents[2]
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(32 * 64, 10),
        )

    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y)


def batches(num=5, *, size=16, seed=0):
    """Return batches in pinned memory, as the loader's are."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.arange(size) % 10).pin_memory()
    return [(torch.randn(size, 3, 8, 8, generator=g).pin_memory(), labels) for _ in range(num)]


def fresh():
    torch.manual_seed(0)
    model = Net().cuda()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)


def plain(data, *, steps, precision="fp32", channels_last=False, compile=False, accumulation=1):
    model, optimizer = fresh()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile:
        model.compile()
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    dtype, losses, forwards = AUTOCAST[precision], [], 0
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulation):
            x, y = (part.cuda() for part in data[forwards % len(data)])
            forwards += 1
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                loss = model(x, y)
            scaler.scale(loss / accumulation).backward()
            total += loss.item() / accumulation
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(total)
    return model.state_dict(), losses


@pytest.fixture
def repeatable():
    with numerics(deterministic=True, float32_matmul=None):
        yield


CASES = [
    {},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"channels_last": True, "precision": "bf16"},
    {"accumulation": 2},
    {"compile": True},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_it_equals_a_plain_loop_bit_for_bit(settings, repeatable):
    expected, losses = plain(batches(), steps=30, **settings)
    model, optimizer = fresh()
    trainer = Trainer(model, optimizer, batches(), **settings)
    assert trainer.device.type == "cuda"
    trainer.train(0, 30)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ours = [value for value, _ in trainer.storage.history("loss").values()]
    assert ours == pytest.approx(losses, rel=1e-6)


@pytest.fixture
def waiting_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 1.0}, {"accumulation": 2}, {"precision": "fp16"}], ids=str
)
def test_an_ordinary_step_does_not_wait(settings, tmp_path, short_windows, waiting_allowed_again):
    proves_it_would_raise(torch.device("cuda"))
    model, optimizer = fresh()
    hooks = default_hooks(optimizer, tmp_path)
    hooks |= {"memory": TorchMemoryStats(), "forbids": ForbidsSynchronisation()}
    trainer = Trainer(model, optimizer, batches(), hooks=hooks, window=5, **settings)
    trainer.train(0, 100)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == [*range(4, 100, 5)]


def test_nor_does_a_waiting_hook_pass(tmp_path, waiting_allowed_again):
    """The negative control of the test above."""

    class Waits(HookBase):
        def after_step(self):
            self.trainer.module.net[0].bias.sum().item()

    model, optimizer = fresh()
    hooks = [ForbidsSynchronisation(), Waits()]
    trainer = Trainer(model, optimizer, batches(), hooks=hooks, window=5)
    with pytest.raises(RuntimeError, match="synchroniz"):
        trainer.train(0, 100)
    assert trainer.iter == WARM_UP_STEPS


def python(*words, cwd):
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command_resumes_bit_for_bit(tmp_path, precision):
    done = python(
        *("-m", "distrain.checkpoint", "--verify-resume", "--iterations", "60"),
        *("+experiment=digits", "launch.ranks=1"),
        *("trainer.deterministic=true", "data.seed_samples=true", "data.workers=2"),
        f"trainer.precision={precision}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume is bit-identical" in done.stdout


def test_the_command_tells_of_the_gpu(tmp_path):
    done = python(
        *("-m", "distrain", "+experiment=digits"),
        *("launch.ranks=1", "trainer.max_iter=400", "run.dir=run"),
        *("hooks=[default,throughput,memory,profiler]", "hooks.gpu.period_s=0.05"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = {name: value for row in rows for name, value in json.loads(row).items()}
    properties = torch.cuda.get_device_properties(0)
    total_mib = properties.total_memory / 2**20
    assert seen["gpu/memory_total_mib"] == pytest.approx(total_mib, rel=0.05)
    assert 0 < seen["gpu/memory_used_mib"] < total_mib
    assert 0 <= seen["gpu/utilization_percent"] <= 100
    assert 10 < seen["gpu/power_w"] < 2000
    assert 10 < seen["gpu/temperature_c"] < 110
    assert seen["gpu/energy_j"] > 0
    assert 0 < seen["memory/allocated_peak_mib"] <= seen["memory/reserved_peak_mib"] < total_mib
    assert seen["eval/accuracy"] > 0.9
    (trace,) = (tmp_path / "run" / "profile").glob("rank_0.*.pt.trace.json")
    kinds = {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "kernel" in kinds
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert f"rank 0: {properties.name}" in log
