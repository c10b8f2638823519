"""A user's own script, without a configuration, under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from torch.nn import functional as F
import distrain
from distrain.checkpoint.store import CheckpointStore
from distrain.data.loader import TrainLoader
from distrain.distributed.ranks import process_group
from distrain.hooks import IterationTimer, LRScheduler, PeriodicCheckpointer, PeriodicWriter

class Model(torch.nn.Linear):
    def forward(self, x, y):
        return F.mse_loss(super().forward(x), y)

with process_group() as where:
    torch.manual_seed(0)
    model, x = Model(3, 1), torch.randn(100, 3)
    optimizer = torch.optim.SGD(distrain.param_groups(model, lr=0.1, weight_decay=0.0), lr=0.1)
    data = TrainLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=20,
                       rank=where.rank, world_size=where.world_size)
    schedule = distrain.WarmupCosineLR(optimizer, 200, warmup_iters=10)
    hooks = [IterationTimer(), LRScheduler(schedule), PeriodicWriter(run_dir=sys.argv[1]),
             PeriodicCheckpointer(100, checkpoints=CheckpointStore(sys.argv[1] + "/checkpoints"))]
    distrain.Trainer(model, optimizer, data, hooks=hooks).train(0, 200)
"""


@pytest.mark.ranks
def test_twenty_lines_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(script), str(run)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(19, 200, 20))
    assert rows[-1]["loss"] < 1e-3 < rows[0]["loss"]
    assert result.stdout.count("iter 199/200") == 1  # rank 0 alone speaks
    assert (run / "checkpoints" / "iter_0000000200" / "manifest.json").exists()
    assert len([*run.glob("events.out.tfevents.*")]) == 1
