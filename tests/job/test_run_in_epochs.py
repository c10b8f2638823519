"""Lengths in epochs: of a run, of its schedule, of the periods of hooks; by command and script."""

import json
import math
import sys

import pytest
import torch
from project import write_project
from ranks import run_ranks
from resume_cases import conf_of, differing, interrupted_and_straight, state_of, train
from torch import nn
from torch.utils.data import DataLoader

from distrain import HookBase, Trainer
from distrain.cli.command import Command
from distrain.hooks import EvalHook
from distrain.runs.records import read

COSINE = "distrain.schedule.WarmupCosineLR"
CODE = """
import torch
from torch import nn

class Points(torch.utils.data.Dataset):
    def __init__(self, num=40):
        self.x = torch.linspace(-1, 1, num)[:, None]
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i], self.x[i] ** 2

class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
    def forward(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)
"""
CONF = """
# @package _global_
defaults: [{override /schedule: cosine}]
run: {name: tiny}
model: {_target_: points.Fit}
data: {batch_size: 16, train: {_target_: points.Points}, eval: {_target_: points.Points}}
optim: {lr: 0.05}
trainer: {max_epochs: 3, window: 4}
hooks: {checkpoint: {period: 1 epoch}, eval: {period: 0.5 epoch}, gpu: null}
launch: {in_process: true}
"""


def in_epochs_and_in_iterations(rank, folder):
    """29 samples in batches of 12: 4.9 epochs are 12 iterations, 2 epochs end with 5 and 10."""
    schedule = {"_target_": COSINE, "max_iters": "4.9 epochs", "warmup_iters": "1 epoch"}
    settings = {"iters": "4.9 epochs", "period": "2 epochs", "schedule": schedule, "workers": 2}
    states = interrupted_and_straight(rank, folder, **settings)
    schedule = {"_target_": COSINE, "max_iters": 12, "warmup_iters": 3}
    train(conf_of(schedule=schedule, workers=2), folder / "iterations")
    return None if states is None else (*states, state_of(folder / "iterations"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_in_epochs_is_one_in_iterations_bit_for_bit(tmp_path, world_size):
    broken, whole, plain = run_ranks(in_epochs_and_in_iterations, world_size, tmp_path)[0]
    assert not differing(broken, whole)
    assert not differing(whole, plain)
    saved = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").glob("iter_*"))
    assert [int(name[5:]) for name in saved] == [5, 10, 12]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    write_project(tmp_path, module="points", code=CODE, experiment="points", conf=CONF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def command(*overrides):
        argv = ["distrain", "--config-dir", "conf", "+experiment=points", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        code = Command(argv[1:]).run()
        return (code, *capfd.readouterr())

    yield command
    sys.modules.pop("points", None)


def test_the_command(command, tmp_path):
    code, out, _ = command("plan=true")
    assert code == 0
    assert "40 samples, 16 per step over all ranks, 8 steps = 3.2 epochs" in out
    code, out, err = command()
    assert code == 0, err
    assert "iter 7/8  epoch 3.20/3.2  " in out
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == [3, 7]
    evaluations = [line["iteration"] for line in lines if any(k.startswith("eval") for k in line)]
    assert evaluations == [1, 2, 3, 4, 6, 7]  # at every 0.5 epoch
    assert lines[-1]["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert sorted(path.name[-2:] for path in (run / "checkpoints").glob("iter_*")) == [
        *("03", "05", "08")
    ]
    assert read(run).max_iter == 8
    code, out, _ = command()
    assert (code, "all 8 iterations are done" in out) == (0, True)
    code, out, err = command("trainer.max_epochs=5")
    assert code == 0, err
    assert "iter 12/13  epoch 5.20/5.2  " in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_iter=5"], "trainer.max_epochs=3: expected trainer.max_iter=null with it"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: expected a finite number > 0"),
        (["trainer.max_epochs=null"], "trainer.max_iter: expected a value"),
        (["trainer.max_time=soon"], "trainer.max_time=soon: expected a duration, as 15m, 2h30m"),
        (["hooks.eval.period=1 epochen"], "hooks.eval.period=1 epochen: expected an integer >= 1"),
        (
            ["data.train=null", "+data.loader={_target_: itertools.repeat, object: 1}"],
            "trainer.max_iter=3 epochs: expected a number of iterations, as the length of the data",
        ),
    ],
)
def test_a_mistake_is_one_line(command, overrides, words, tmp_path):
    code, _, err = command(*overrides)
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err
    assert not (tmp_path / "runs").exists()


class Mse(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, x):
        return self.net(x).square().mean()


class Seen(HookBase):
    def after_step(self):
        self.iterations = [*getattr(self, "iterations", ()), self.trainer.iter_done]


def test_a_script_with_a_data_loader():
    model = Mse()
    loader = DataLoader(torch.ones(10, 1), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluated = []
    evaluate = EvalHook("1.5 epochs", function=lambda: evaluated.append(trainer.iter_done) or {})
    trainer = Trainer(model, optimizer, loader, hooks=[seen := Seen(), evaluate], accumulation=2)
    trainer.train(0, "3 epochs")  # of 3 batches, two per iteration: 4.5 iterations
    assert seen.iterations == [1, 2, 3, 4, 5]
    assert evaluated == [3, 5]
