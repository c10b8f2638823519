"""--verify-resume: what it says of an experiment that resumes, and of two that do not."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from project import write_project

from distrain.cli import verify_resume as verify
from distrain.cli.checkpoint import main
from distrain.cli.command import Command

CODE = """
import random, torch
from torch import nn
from distrain import HookBase

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, i):
        x = torch.full((1,), i / 20)
        return x, x ** 2

class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    def forward(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)

class Forgets(HookBase):
    '''Halves every fourth gradient, and does not say how far it has counted.'''
    count = 0
    def after_backward(self):
        self.count += 1
        if self.count % 4 == 0:
            for p in self.trainer.module.parameters():
                p.grad /= 2

class Unseeded(HookBase):
    def after_backward(self):
        for p in self.trainer.module.parameters():
            p.grad *= random.SystemRandom().random()
"""
CONF = """
# @package _global_
run: {name: small}
model: {_target_: verify_small.Fit}
data: {batch_size: 4, train: {_target_: verify_small.Points}}
optim: {lr: 0.05}
trainer: {max_iter: 1000, window: 5}
schedule: {_target_: distrain.schedule.WarmupCosineLR, max_iters: "${trainer.max_iter}"}
launch: {in_process: true}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    write_project(tmp_path, module="verify_small", code=CODE, experiment="small", conf=CONF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(verify, "run_command", here)
    yield ["--verify-resume", "--iterations", "12", "--config-dir", "conf", "+experiment=small"]
    sys.modules.pop("verify_small", None)


def here(command):
    """Run the command in this process, where torch is loaded: that takes 50 ms, and not 2 s."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["distrain", *command[3:]]
    try:
        with redirect_stdout(out), redirect_stderr(out):
            code = Command(sys.argv[1:]).run()
    finally:
        sys.argv = before
    return int(code), out.getvalue()


def test_what_resumes(small, capsys, tmp_path):
    assert main(small) == 0
    out = capsys.readouterr().out
    assert "resume is bit-identical (12 iterations straight, and 5 + the rest, on ranks: 1)" in out
    parts = {line.split()[0]: line.split()[-1] for line in out.splitlines()[1:-1]}
    assert {"iteration", "model", "optimizer", "schedule", "rng", "histories"} <= parts.keys()
    assert set(parts.values()) == {"="}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == [
        "conf",
        "verify_small.py",
    ], "nothing is left in the user's folder"


def test_a_hook_that_forgets_is_found(small, capsys):
    assert main([*small, "+hooks.forgets._target_=verify_small.Forgets"]) == 1
    out = capsys.readouterr().out
    assert "NOT bit-identical (12 iterations straight, and 5 + the rest): model, optimizer" in out
    assert "two straight runs are equal" in out


def test_a_training_that_is_never_twice_the_same_is_told_apart(small, capsys):
    assert main([*small, "+hooks.random._target_=verify_small.Unseeded"]) == 1
    assert "two straight runs differ as well, in model, optimizer" in capsys.readouterr().out


def test_a_run_that_does_not_work_shows_why(small, capsys):
    assert main([*small, "optim.lr=abc"]) == 2
    err = capsys.readouterr().err
    assert "optim.lr=abc" in err
    assert "straight: exit code 2, not 0" in err
    assert main([*small, "hooks.checkpoint=null"]) == 2
    assert "no checkpoint of iteration 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--iterations", "1"], ["--stop-at", "12"], ["--stop-at", "0"], ["-m"], ["plan=true"]],
)
def test_what_does_not_work_is_refused(small, options, capsys):
    with pytest.raises(SystemExit) as end:
        main([*small, *options])
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_each_start_is_a_process_of_its_own(monkeypatch):
    code, output = verify.run_command([sys.executable, "-c", "print('so'); raise SystemExit(75)"])
    assert (code, output) == (75, "so\n")
