"""The command as its users run it: what it leaves, and what it says of their mistakes."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from checkpoint_cases import forge
from project import write_project
from run_module import run_module

from distrain.checkpoint.catalog import describe
from distrain.cli.command import Command

ROOT = Path(__file__).parents[2]
TINY = """
import math, torch
from torch import nn
from distrain import HookBase, get_event_storage

class Points(torch.utils.data.Dataset):
    def __init__(self, num=40):
        self.x = torch.linspace(-1, 1, num)[:, None]
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i], self.x[i] ** 2

class Fit(nn.Module):
    def __init__(self, answer="loss", bad_from=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.answer, self.bad_from = answer, bad_from
    def forward(self, x, y):
        loss = nn.functional.mse_loss(self.net(x), y)
        if self.answer == "logits":
            return self.net(x)
        if self.bad_from is not None and get_event_storage().iter >= self.bad_from:
            loss = loss * math.nan
        return loss

class Crash(HookBase):
    def after_step(self):
        if self.trainer.iter == 5 and self.trainer.where.rank == 1:
            raise KeyError("broken on purpose")
"""
CONF = """
# @package _global_
run: {name: tiny}
model: {_target_: tiny.Fit}
data: {batch_size: 8, train: {_target_: tiny.Points}, eval: {_target_: tiny.Points}}
optim: {lr: 0.05}
trainer: {max_iter: 30, window: 10}
hooks: {checkpoint: {period: 10}}
launch: {in_process: true}
"""


@pytest.fixture
def folder(tmp_path):
    write_project(tmp_path, module="tiny", code=TINY, experiment="tiny", conf=CONF)
    return tmp_path


def distrain(folder, *overrides, experiment="tiny"):
    words = ["--config-dir", "conf", f"+experiment={experiment}", *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run_module("distrain", *words, cwd=folder, env=env)


def rows(folder, run="tiny"):
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_and_the_same_command_again(folder):
    first = distrain(folder)
    assert first.returncode == 0, first.stderr
    assert "tensorboard --logdir" in first.stderr
    assert [row["iteration"] for row in rows(folder)] == [9, 19, 29]
    run = folder / "runs" / "tiny"
    assert {p.name for p in run.iterdir()} >= {
        "run.yaml",
        "command.json",
        "logs",
        "checkpoints",
        "metrics.jsonl",
    }
    assert [*run.glob("events.out.tfevents.*")]
    again = distrain(folder)
    assert again.returncode == 0
    assert "30 iterations are done" in again.stdout
    longer = distrain(folder, "trainer.max_iter=45")
    assert longer.returncode == 0, longer.stderr
    assert "continuing after iteration 30" in longer.stderr
    assert [row["iteration"] for row in rows(folder)] == [9, 19, 29, 39, 44]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["optim=adamww"], ["optim=adamww", "adamw", "sgd"]),
        (["optim.lr=abc"], ["optim.lr", "abc", "number"]),
        (["trainer.max_iter=-3"], ["trainer.max_iter=-3", "at least"]),
        (["data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
        (["trainer.accumulation=3"], ["data.batch_size=8", "trainer.accumulation=3", "9"]),
        (["model._target_=tiny.Fitt"], ["model._target_=tiny.Fitt", "Fit"]),
        (["model._target_=nowhere.Fit"], ["model._target_=nowhere.Fit", "no module nowhere"]),
        (["+model.wide=3"], ["model.wide", "answer"]),
        (["+model.answer=logits"], ["returned a tensor of shape [8, 1]", "expected a loss"]),
        (["+data.train.num=0"], ["data.train", "length 0"]),
        (["schedule=multistep", "schedule.milestones=[20,10]"], ["[20, 10]"]),
        (["schedule._target_=distrain.schedule.schedules.Cosine"], ["schedule._target_", "Cosine"]),
        (["resume=must"], ["resume=must", "resume=auto"]),
        (["trainer.precision=fp8"], ["trainer.precision=fp8", "bf16"]),
        (["trainer.comm_hook=int8"], ["trainer.comm_hook=int8", "bf16", "powersgd"]),
        (["optim.layer_decay=0"], ["optim.layer_decay=0", "above 0"]),
        (["init.weights=nowhere.pt"], ["init.weights=", "nowhere.pt", "no such file"]),
        (["init.weights=tiny.py"], ["init.weights=", "tiny.py", "save model.state_dict()"]),
        (["+with=ema", "hooks.ema.decay=1"], ["hooks.ema.decay=1", "[0, 1)"]),
        (["+hooks.mine._target_=tiny.Points"], ["hooks.mine._target_=tiny.Points", "HookBase"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, overrides, words, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["distrain", "--config-dir", "conf", "+experiment=tiny"])
    sys.argv += overrides
    code = Command(sys.argv[1:]).run()  # here, for torch is loaded already
    sys.modules.pop("tiny", None)
    err = capfd.readouterr().err
    assert code == 2, err
    lines = [line for line in err.splitlines() if not line.startswith("distrain: starting ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0]
    assert not (folder / "runs").exists() or not list((folder / "runs").iterdir())


def test_an_unknown_experiment_names_the_choices(folder):
    result = distrain(folder, experiment="tinny")
    assert result.returncode == 2
    assert all(name in result.stderr for name in ("experiment=tinny", "tiny", "digits"))


def test_another_configuration_in_the_folder_is_refused(folder):
    assert distrain(folder, "trainer.max_iter=10").returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.name != "lock"}
    result = distrain(folder, "optim.lr=0.01")
    assert result.returncode == 2
    assert all(word in result.stderr for word in ("optim.lr", "0.05", "0.01", "run.name"))
    after = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.name != "lock"}
    assert after == before


def test_a_loss_that_is_not_finite(folder):
    result = distrain(folder, "+model.bad_from=13")
    assert result.returncode == 1
    assert "loss not finite from iteration 13 on, on rank 0 of 1" in result.stderr
    assert "Traceback" not in result.stderr
    kept = [p.name for p in (folder / "runs" / "tiny" / "checkpoints").glob("iter_*")]
    assert kept == ["iter_0000000010"]


def test_a_corrupt_checkpoint_is_named_and_passed_over(folder):
    assert distrain(folder).returncode == 0
    file = folder / "runs" / "tiny" / "checkpoints" / "iter_0000000030" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    result = distrain(folder, "trainer.max_iter=40")
    assert result.returncode == 0, result.stderr
    assert "iter_0000000030" in result.stderr
    assert "continuing after iteration 20" in result.stderr


def test_the_plan_trains_nothing(folder):
    result = distrain(folder, "plan=true", "schedule=cosine")
    assert result.returncode == 0, result.stderr
    for words in (
        "net.0.weight",
        "PeriodicCheckpointer",
        "learning rate",
        "40 samples",
        "one rank",
    ):
        assert words in result.stdout
    assert not (folder / "runs").exists()


@pytest.mark.ranks
def test_the_first_failing_rank_is_told_once_with_its_log(folder):
    result = distrain(
        folder, "launch.in_process=false", "launch.ranks=2", "+hooks.crash._target_=tiny.Crash"
    )
    assert result.returncode == 1
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert "rank 1 failed: KeyError" in result.stderr
    assert "logs/rank_1.log" in result.stderr


@pytest.mark.ranks
def test_restarts_continue_from_the_newest_checkpoint(folder):
    (folder / "tiny.py").write_text(
        TINY
        + """
class CrashOnce(HookBase):
    def after_step(self):
        import os
        if self.trainer.iter == 15 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), 9)
"""
    )
    result = distrain(
        folder,
        "launch.in_process=false",
        "launch.ranks=2",
        "launch.max_restarts=1",
        "+hooks.crash._target_=tiny.CrashOnce",
    )
    assert result.returncode == 0, result.stderr
    assert "continuing after iteration 10" in result.stderr
    assert [row["iteration"] for row in rows(folder)] == [9, 19, 29]


UNSAVABLE = """
class Foreign(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, Foreign) else a for a in args]
        return func(*plain, **(kwargs or {}))

class Odd(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = p.detach().clone().as_subclass(Foreign)
        return super().step(closure)

class OddHook(HookBase):
    def state_dict(self):
        return {"open": {1, 2}}

class Count(HookBase):
    def after_step(self):
        print("stepped", self.trainer.iter_done, flush=True)
"""


@pytest.mark.parametrize(
    ("overrides", "words", "steps"),
    [
        (["+hooks.odd._target_=tiny.OddHook"], "hooks.odd.open: a builtins.set cannot be saved", 0),
        (["optim.target=tiny.Odd"], "optimizer.state.0.odd: a tiny.Foreign cannot be saved", 1),
    ],
)
def test_a_state_that_cannot_be_saved_is_found_before_anything_is_trained(
    folder, overrides, words, steps
):
    (folder / "tiny.py").write_text(TINY + UNSAVABLE)
    result = distrain(folder, *overrides, "+hooks.count._target_=tiny.Count")
    assert result.returncode == 2, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout.count("stepped") == steps
    assert not (folder / "runs").exists()  # nothing of the run is lost, and nothing left


WRONG_METRICS = """
class Typo(Fit):
    def metrics(self, x, y):
        return {"error": self.net(x) - yy}

class Mean(Fit):
    def metrics(self, x, y):
        return {"error": (self.net(x) - y).mean()}
"""


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("Typo", 1, "self.net(x) - yy"), ("Mean", 2, "metric 'error' is []: expected one value per")],
)
def test_a_mistake_in_metrics_is_found_before_anything_is_trained(folder, model, code, words):
    (folder / "tiny.py").write_text(TINY + UNSAVABLE + WRONG_METRICS)
    two_ranks = ["launch.in_process=false", "launch.ranks=2", "launch.max_restarts=0"]
    target = f"model._target_=tiny.{model}"
    result = distrain(folder, *two_ranks, target, "+hooks.count._target_=tiny.Count")
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "stepped" not in result.stdout
    assert [*(folder / "runs").glob("*/checkpoints/iter_*")] == []


LISTED = """
import os

class Listed(Points):
    def __init__(self, num=40, missing=0):
        super().__init__(num - missing * int(os.environ["RANK"]))
        if not missing:  # another order
            self.x = self.x.roll(int(os.environ["RANK"]), 0)
"""


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.train._target_=tiny.Listed"],
            "data.train: sample 0 is (float32[1] -1, float32[1] 1) on rank 0, (float32[1] 1, "
            "float32[1] 1) on rank 1; expected the same data set on all ranks",
        ),
        (
            ["data.eval._target_=tiny.Listed", "+data.eval.missing=10"],
            "data.eval: rank 0 has 40 samples, rank 1 has 30; expected the same data set",
        ),
    ],
)
def test_data_that_differs_between_ranks_is_refused(folder, overrides, words):
    (folder / "tiny.py").write_text(TINY + LISTED)
    result = distrain(folder, "launch.in_process=false", "launch.ranks=2", *overrides)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr.splitlines()[-1]
    assert not (folder / "runs").exists()


@pytest.mark.ranks
def test_a_run_changes_between_ddp_and_fsdp_by_command(folder):
    two = ["launch.in_process=false", "launch.ranks=2"]
    for done, strategy in ((10, "ddp"), (20, "fsdp"), (30, "ddp")):
        result = distrain(folder, *two, f"trainer.strategy={strategy}", f"trainer.max_iter={done}")
        assert result.returncode == 0, result.stderr
        assert done == 10 or f"continuing after iteration {done - 10} on 2" in result.stderr
    starts = json.loads((folder / "runs" / "tiny" / "command.json").read_text())["starts"]
    assert [start["changed"].get("trainer.strategy") for start in starts] == [
        None,
        ["ddp", "fsdp"],
        ["fsdp", "ddp"],
    ]
    assert distrain(folder, *two, "run.name=straight").returncode == 0
    changed, straight = rows(folder), rows(folder, "straight")
    assert [row["iteration"] for row in changed] == [9, 19, 29]
    for a, b in zip(changed, straight, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def refused_at_0(folder):
    result = distrain(folder, "trainer.max_iter=40")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def forge_parts(path, **parts):
    """Put other parts into a checkpoint and sign it again; None removes a part."""
    tree = json.loads((path / "state.json").read_text())
    tree = {k: parts.get(k, v) for k, v in tree.items() if parts.get(k, v) is not None}
    forge(path, state=json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"model": {}}, "is of another model: it lacks net.0.weight"),
        ({"optimizer": None, "rng": None}, "lacks parts of every run: optimizer, rng"),
        ({"optimizer": {}}, "lacks the state of the optimizer"),
        ({"stream": {"iteration": 7}}, "the position in the data of another iteration"),
        ({"rng": {"ranks": []}}, "lacks the random generators"),
        ({"model": None}, "lacks parts of every run: model"),
    ],
)
def test_a_forged_checkpoint_is_named_and_passed_over(folder, parts, words):
    if not (folder / "runs").exists():
        assert distrain(folder).returncode == 0
    path = folder / "runs" / "tiny" / "checkpoints" / "iter_0000000030"
    forge_parts(path, **parts)
    result = distrain(folder, "trainer.max_iter=40")
    assert result.returncode == 0, result.stderr
    assert words in result.stderr
    assert "continuing after iteration 20" in result.stderr


def test_a_checkpoint_of_another_run_is_passed_over(folder):
    assert distrain(folder).returncode == 0
    assert distrain(folder, "run.name=other", "seed=3").returncode == 0
    mine, other = (folder / "runs" / name / "checkpoints" for name in ("tiny", "other"))
    shutil.rmtree(mine / "iter_0000000030")
    shutil.copytree(other / "iter_0000000030", mine / "iter_0000000030")
    result = distrain(folder)
    assert result.returncode == 0, result.stderr
    assert "iter_0000000030 was written by another run" in result.stderr
    assert "continuing after iteration 20" in result.stderr
    assert describe(mine / "iter_0000000030").run_id == (mine / "run_id").read_text().strip()


def test_a_model_that_has_changed_is_told_and_nothing_begins_at_0(folder):
    assert distrain(folder).returncode == 0
    metrics = rows(folder)
    code = TINY.replace("nn.Linear(8, 1))", "nn.Linear(8, 1), nn.Linear(1, 1))")
    (folder / "tiny.py").write_text(code.replace("nn.Linear(1, 8)", "nn.Linear(1, 8, bias=False)"))
    line = refused_at_0(folder)
    assert "none of 3 checkpoints can be continued from" in line
    assert "it has net.0.bias, it lacks net.3.weight, it lacks net.3.bias" in line
    assert rows(folder) == metrics


VANISH = """
class Vanish(HookBase):
    order = 5
    def __init__(self, how, *, run_dir, checkpoints):
        self.how, self.run_dir, self.checkpoints = how, run_dir, checkpoints
    def after_step(self):
        import os, shutil
        if self.trainer.iter == 12 and self.trainer.where.is_main:
            self.checkpoints.wait()
            if self.how == "moved":
                os.rename(self.run_dir, self.run_dir + "-moved")
            else:
                shutil.rmtree(self.run_dir)
            if self.how == "replaced":
                os.mkdir(self.run_dir)
"""


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        ("deleted", 1),
        ("moved", 1),
        ("replaced", 1),
        pytest.param("deleted", 2, marks=pytest.mark.ranks),
    ],
)
def test_a_run_folder_that_vanishes_is_noticed(folder, how, ranks):
    (folder / "tiny.py").write_text(TINY + VANISH)
    hook = ["+hooks.vanish._target_=tiny.Vanish", f"+hooks.vanish.how={how}"]
    launch = [] if ranks == 1 else ["launch.in_process=false", f"launch.ranks={ranks}"]
    result = distrain(folder, *hook, *launch, "launch.max_restarts=1")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "this folder is gone" in result.stderr.splitlines()[-1]
    assert "starting again" not in result.stderr
    assert "finished" not in result.stderr
    run = folder / "runs" / "tiny"
    assert run.exists() == (how == "replaced")
    assert how != "replaced" or not list(run.iterdir())  # nothing of ours in a folder of others
    if how == "moved":
        kept = [p.name for p in (folder / "runs" / "tiny-moved" / "checkpoints").glob("iter_*")]
        assert kept == ["iter_0000000010"]
    if how != "replaced":
        (folder / "tiny.py").write_text(TINY + VANISH.replace("iter == 12", "iter == -1"))
        again = distrain(folder, *hook, *launch)
        assert again.returncode == 0, again.stderr
        assert "continuing" not in again.stderr
