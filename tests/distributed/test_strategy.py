"""Strategies: the base class, the choice by name or by `_target_`, and the example."""

import math
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from run_module import run_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain import Trainer
from distrain.checkpoint.store import CheckpointStore
from distrain.distributed import DDP, FSDP, Strategy
from distrain.distributed.strategy import check_clipping
from distrain.distributed.strategy_by_name import make_strategy
from distrain.errors import ConfigError
from distrain.job.strategy import build_strategy
from examples.local_sgd import LocalSGD

ROOT = Path(__file__).parents[2]
DEFAULTS = {"strategy": "ddp", "ddp": {}, "fsdp": {}, "comm_hook": "none", "comm_options": {}}


def leaves(*gradients):
    """Return parameters with these gradients."""
    made = [torch.zeros(len(g), requires_grad=True) for g in gradients]
    for p, g in zip(made, gradients, strict=True):
        p.grad = torch.tensor(g)
    return [*made, torch.zeros(2, requires_grad=True)]  # one without a gradient


def test_clip_by_norm():
    parameters = leaves([3.0, 0.0], [4.0])
    total = Strategy().clip(parameters, norm=1.0)
    assert total.shape == ()
    assert total.item() == 5.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]))
    parameters = leaves([3.0, 0.0], [4.0])
    assert Strategy().clip(parameters, norm=math.inf).item() == 5.0
    assert parameters[1].grad.tolist() == [4.0]
    assert Strategy().clip(leaves([math.nan]), norm=1.0).isnan()


class NoReadBack(TorchDispatchMode):
    """Fails where a tensor becomes a number of Python, which would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_clipping_reads_nothing_back():
    parameters = leaves([3.0, 0.0], [4.0])
    with NoReadBack():
        Strategy().clip(parameters, norm=1.0)
        Strategy().clip(parameters, value=1.0)
    with pytest.raises(AssertionError), NoReadBack():
        parameters[1].grad.sum().item()


def test_clip_by_value():
    parameters = leaves([3.0, -0.5], [-4.0])
    assert Strategy().clip(parameters, value=1.0) is None
    assert [p.grad.tolist() for p in parameters[:2]] == [[1.0, -0.5], [-1.0]]


@pytest.mark.parametrize(
    "limits", [(1.0, 1.0), (0, None), (None, -1), (math.nan, None), (10**400, None)]
)
def test_wrong_limits(limits):
    with pytest.raises(ConfigError, match="clip_"):
        check_clipping(*limits)


def test_the_choice_by_name_and_by_target():
    assert type(build_strategy(DEFAULTS)) is DDP
    assert type(build_strategy(DEFAULTS | {"strategy": "fsdp"})) is FSDP
    node = {"_target_": "examples.local_sgd.LocalSGD", "every": 2}
    strategy = build_strategy(DEFAULTS | {"strategy": node})
    assert strategy.every == 2
    assert make_strategy(strategy) is strategy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": {"_target_": "torch.nn.ReLU"}}, "trainer.strategy._target_=torch.nn.ReLU"),
        ({"strategy": "fsdp", "comm_hook": "bf16"}, "trainer.comm_hook=bf16: expected none"),
        ({"strategy": "zero"}, "trainer.strategy=zero: expected one of ddp, fsdp"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_strategy(DEFAULTS | settings)


class Weight(nn.Module):
    """The gradient of w is the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.w * x.mean()


def local_sgd(rank, steps):
    model = Weight()
    with torch.no_grad():
        model.w += rank  # all ranks train with rank 0's weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = [torch.tensor([1.0]), torch.tensor([2.0 + 4.0 * rank])]
    Trainer(model, optimizer, data, strategy=LocalSGD(every=2)).train(0, steps)
    return model.w.item()


@pytest.mark.ranks
def test_local_sgd_by_hand():
    assert run_ranks(local_sgd, 2, 1) == [-0.5, -0.5]
    # rank 0: -0.5 * (1 + 2), rank 1: -0.5 * (1 + 6); the mean after the second update
    assert run_ranks(local_sgd, 2, 2) == [-2.5, -2.5]
    # apart again at an odd number of updates
    assert run_ranks(local_sgd, 2, 4) == [-5.0, -5.0]


def test_local_sgd_does_not_go_with_skipped_updates():
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(ConfigError, match="trainer.nonfinite=skip"):
        Trainer(model, optimizer, [], strategy=LocalSGD(), nonfinite="skip")


HALVES = """
from distrain.distributed import DDP, Topology

class Halves(DDP):
    '''Two ranks train on the same part of a batch, as the two halves of a replica would.'''

    def data_ranks(self, ranks):
        return Topology(ranks.rank // 2, ranks.world_size // 2)
"""


def distrain(folder, *overrides):
    """Run the command in the root of the repository, with modules of a folder."""
    words = ["+experiment=digits", "launch.ranks=2", *overrides]
    return run_module("distrain", *words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(folder)})


@pytest.mark.ranks
def test_the_command_of_the_example(tmp_path):
    lines = (ROOT / "examples" / "local_sgd.py").read_text().splitlines()
    (node,) = [line.strip(" '") for line in lines if "trainer.strategy=" in line]
    end = [f"run.dir={tmp_path}/run", "trainer.max_iter=40"]
    result = distrain(tmp_path, node, "hooks.guard=null", *end)
    assert result.returncode == 0, result.stderr
    state = CheckpointStore(tmp_path / "run" / "checkpoints").load(40)
    assert state["stream"]["samples_per_forward"] == 64


@pytest.mark.ranks
def test_ranks_of_one_replica_load_the_same_part(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    node = "trainer.strategy={_target_: halves.Halves}"
    result = distrain(tmp_path, node, f"run.dir={tmp_path}/run", "trainer.max_iter=4")
    assert result.returncode == 0, result.stderr
    state = CheckpointStore(tmp_path / "run" / "checkpoints").load(4)
    assert state["stream"]["samples_per_forward"] == 128, "the whole batch"
