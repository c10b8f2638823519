"""Nothing of ours draws random numbers during training: a terminal, a writer change no bit."""

import os
import pty
import subprocess
import sys
import threading

import pytest
from project import write_project

CODE = """
import random
import numpy, torch
from torch import nn
import distrain

class Data:
    def __len__(self):
        return 60
    def __getitem__(self, i):
        noise = random.random() + numpy.random.rand() + torch.rand(1).item()
        return torch.full((4,), i / 60 + noise)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
    def forward(self, x):
        return (self.layer(x) - 1).square().mean()
    def metrics(self, x):
        return {"error": self.layer(x + random.random() + torch.rand(1)).abs()[:, 0]}

class Fixed(Data):
    def __getitem__(self, i):
        return torch.full((4,), i / 60)

def states():
    _, keys, position, *_ = numpy.random.get_state()
    return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()

class Watch(distrain.HookBase):
    order, order_at_end = -1000, 1000
    def before_train(self):
        self._before = states()
    def after_train(self):
        assert states() == self._before, "something drew random numbers"
        assert self.trainer.error is None
"""
CONF = """# @package _global_
defaults: [{override /optim: sgd}]
model: {_target_: drawing.Net}
data:
  batch_size: 12
  train: {_target_: drawing.Data}
  eval: {_target_: drawing.Data}
trainer: {max_iter: 20, window: 5}
optim: {lr: 0.01}
hooks: {checkpoint: {period: 10}, eval: {period: 5}}
launch: {ranks: 2}
"""


@pytest.fixture
def run(tmp_path):
    write_project(tmp_path, module="drawing", code=CODE, experiment="drawing", conf=CONF)
    command = [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=drawing"]

    def run(name, *overrides, terminal=False):
        words = [*command, f"run.name={name}", *overrides]
        env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
        if not terminal:
            done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout + done.stderr
        ours, theirs = pty.openpty()
        process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=theirs, stderr=theirs)
        os.close(theirs)
        read: list[bytes] = []
        reader = threading.Thread(target=_read, args=(ours, read))
        reader.start()
        code = process.wait(timeout=100)
        reader.join()
        os.close(ours)
        text = b"".join(read).decode()
        assert code == 0, text
        return text

    return run


def _read(descriptor, read):
    try:
        while part := os.read(descriptor, 1 << 16):
            read.append(part)
    except OSError:  # the other end is closed
        pass


@pytest.mark.ranks
def test_terminal_evaluation_and_writers_change_no_bit(run, tmp_path):
    assert "\x1b[" in run("terminal", terminal=True)  # the bar was there
    lines = run("pipe").splitlines()
    last = next(line for line in reversed(lines) if line.startswith("iter 19/20"))
    end = next(line for line in lines if "finished: 20 of 20" in line)
    assert end.split("loss ")[1].split()[0] == last.split("loss ")[1].split()[0]  # the median
    run("no_eval", "hooks.eval=null")
    run("no_writer", "hooks.writer=null")
    for name in ("pipe", "no_eval", "no_writer"):
        words = [sys.executable, "-m", "distrain.checkpoint", "runs/terminal", f"runs/{name}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        same = {line.split()[0] for line in done.stdout.splitlines() if line.endswith("=")}
        assert {"model", "optimizer", "rng"} <= same, done.stdout + done.stderr


@pytest.mark.ranks
def test_no_generator_moves_where_the_user_draws_nothing(run):
    overrides = ["data.train._target_=drawing.Fixed", "+hooks.watch._target_=drawing.Watch"]
    run("watched", *overrides, terminal=True)
