"""Other settings on resume: they take effect, are recorded, and need a permission."""

import copy
import sys

import pytest
import torch
from checkpoint_cases import identical
from ranks import run_ranks
from resume_cases import CRASH, ITERS, SAVED, SGD, conf_of, state_of, train
from torch import nn

import distrain
from distrain import HookBase, Trainer
from distrain.cli.command import Command
from distrain.errors import ConfigError, ExitCode
from distrain.hooks import EvalHook, LRScheduler
from distrain.job.restore import load_state
from distrain.runs.__main__ import run as runs

COSINE = {"_target_": "distrain.schedule.WarmupCosineLR", "max_iters": ITERS, "warmup_iters": 6}
EXPONENTIAL = {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9}
ONE_CYCLE = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": ITERS}
NEW = {**SGD, "lr": 0.02, "momentum": 0.8}


class ByHand(HookBase):
    """What a plain loop does after iteration SAVED, to train on with other settings."""

    order = 21

    def __init__(self, schedule):
        self.schedule = schedule

    def after_step(self):
        if self.trainer.iter_done != SAVED:
            return
        for group in self.trainer.optimizer.param_groups:
            group.update(lr=0.02, initial_lr=0.02, momentum=0.8)
            if type(self.schedule).__name__ == "ExponentialLR":
                for _ in range(SAVED):
                    group["lr"] *= 0.9
        if hasattr(self.schedule, "lr_at"):
            self.schedule.base_lrs = [0.02]
            self.schedule.apply()


def changed_twice_and_by_hand(rank, folder, schedule):
    broken, whole = folder / "broken", folder / "whole"
    settings = {"schedule": schedule, "workers": 2}
    assert train(conf_of(stop={"after": CRASH}, **settings), broken)[0] is None
    # a start with the new settings that saves nothing, and the same again
    _, seen = train(conf_of(stop={"after": CRASH}, optim=NEW, **settings), broken)
    assert sorted(seen) == [*range(SAVED, CRASH)]
    assert train(conf_of(optim=NEW, **settings), broken)[0] == ExitCode.FINISHED
    hooks = {"by_hand": {"_target_": f"{__name__}.ByHand"}}
    assert train(conf_of(hooks=hooks, **settings), whole)[0] == ExitCode.FINISHED
    unchanged = folder / "unchanged"
    train(conf_of(**settings), unchanged)
    return [state_of(path) for path in (broken, whole, unchanged)] if rank == 0 else None


@pytest.mark.parametrize("schedule", [COSINE, EXPONENTIAL])
def test_new_rates_count_as_if_the_schedule_had_always_had_them(tmp_path, schedule):
    changed, by_hand, unchanged = run_ranks(changed_twice_and_by_hand, 2, tmp_path, schedule)[0]
    for part in ("model", "optimizer"):
        assert identical(changed[part], by_hand[part]), part
        assert not identical(changed[part], unchanged[part])


def schedule_changed(rank, folder):
    assert train(conf_of(stop={"after": CRASH}, schedule=COSINE), folder)[0] is None
    assert train(conf_of(schedule=ONE_CYCLE), folder)[0] == ExitCode.FINISHED
    return state_of(folder)["optimizer"]["param_groups"][0]


def test_another_schedule_goes_on_at_its_own_position(tmp_path):
    (group,) = run_ranks(schedule_changed, 1, tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=ITERS)
    for _ in range(ITERS):
        schedule.step()
    expected = optimizer.param_groups[0]
    for key in ("lr", "momentum", "max_lr", "min_lr", "initial_lr"):
        assert group[key] == expected[key], key


class Line(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of the user's own: its state holds the horizon, as of all schedules of torch."""

    def __init__(self, optimizer, max_iters):
        self.max_iters = max_iters
        super().__init__(optimizer)

    def get_lr(self):
        return [base * (1 - self.last_epoch / self.max_iters) for base in self.base_lrs]


def made_longer(rank, folder, schedule):
    assert train(conf_of(schedule={**schedule, "max_iters": ITERS}), folder)[0] == 0
    assert train(conf_of(iters=16, schedule={**schedule, "max_iters": 20}), folder)[0] == 0
    return state_of(folder, 16)["optimizer"]["param_groups"][0]["lr"]


@pytest.mark.parametrize(
    "schedule",
    [
        {"_target_": f"{__name__}.Line"},
        {"_target_": "distrain.schedule.WarmupLinearLR", "warmup_iters": 0},
    ],
)
def test_a_longer_run_has_the_new_horizon(tmp_path, schedule):
    (rate,) = run_ranks(made_longer, 1, tmp_path, schedule)
    assert rate == pytest.approx(SGD["lr"] * (1 - 16 / 20))


def with_rules(rank, folder, before, after):
    assert train(conf_of(stop={"after": CRASH}, optim={**SGD, "rules": before}), folder)[0] is None
    train(conf_of(optim={**SGD, "rules": after}), folder)
    return [group["momentum"] for group in state_of(folder)["optimizer"]["param_groups"]]


@pytest.mark.parametrize(
    ("before", "after", "momenta"),
    [
        (
            [{"match": "net.0.*", "momentum": 0.5}],
            [{"match": "net.0.*", "momentum": 0.3}],
            [0.3, 0.9],
        ),
        (
            {
                "a": {"match": "net.0.*", "momentum": 0.5},
                "b": {"match": "net.5.*", "momentum": 0.3},
            },
            {
                "a": {"match": "net.5.*", "momentum": 0.5},
                "b": {"match": "net.0.*", "momentum": 0.3},
            },
            [0.3, 0.9, 0.5],
        ),
    ],
)
def test_settings_of_changed_rules_take_effect(tmp_path, before, after, momenta):
    assert run_ranks(with_rules, 1, tmp_path, before, after) == [momenta]


def grouped_otherwise(rank, folder):
    assert train(conf_of(stop={"after": CRASH}), folder)[0] is None
    train(conf_of(optim={**SGD, "weight_decay_norm": 0.0}), folder)


def test_settings_that_group_the_parameters_otherwise_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^optim.weight_decay_norm: expected param"):
        run_ranks(grouped_otherwise, 1, tmp_path)


def forwards(rank, folder):
    settings = {"noise": 0.0, "accumulation": 1}
    assert train(conf_of(stop={"after": CRASH}, **settings), folder)[0] is None
    _, seen = train(conf_of(**{**settings, "accumulation": 3}), folder)
    state = state_of(folder)
    return len(seen[SAVED]), state["stream"]["samples_per_forward"]


def test_another_accumulation_takes_effect(tmp_path):
    assert run_ranks(forwards, 1, tmp_path) == [(12, 4)]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def command(*overrides):
        fixed = [
            "+experiment=digits",
            "launch.in_process=true",
            "trainer.window=5",
            "hooks.gpu=null",
        ]
        monkeypatch.setattr(sys, "argv", ["distrain", *fixed, *overrides])
        code = Command(sys.argv[1:]).run()
        return (code, *capfd.readouterr())

    return command


def test_the_command_records_what_has_changed(command, tmp_path, capfd):
    assert command("trainer.max_iter=10")[0] == 0
    longer = ["trainer.max_iter=20", "optim.lr=0.05", "hooks.checkpoint.period=7"]
    code, _, err = command(*longer)
    assert (code, err.count("\n")) == (2, 1)
    assert "optim.lr: 0.1 -> 0.05); give" in err
    assert "or allow_changes=[optim.lr]" in err
    code, _, err = command(*longer, "allow_changes=[optim.rl]")
    assert (code, err.count("\n")) == (2, 1)
    assert "allow_changes=[optim.rl]: no such key; did you mean optim.lr" in err
    code, _, err = command(*longer, "allow_changes=[optim.lr]")
    assert code == 0, err
    assert "optim.lr: 0.1 -> 0.05 from here on" in err
    assert "changed since the checkpoint: optim.lr" in err
    assert runs(["show", "digits"]) == 0
    assert "\n    optim.lr: 0.1 -> 0.05 after iteration 10\n" in capfd.readouterr().out
    events = sorted((tmp_path / "runs" / "digits").rglob("events.*"))
    assert b"optim.lr: 0.1 -> 0.05 after iteration 10" in events[-1].read_bytes()
    assert b"after iteration" not in events[0].read_bytes()
    assert command(*longer)[0] == 0  # it has these values now


class Both(distrain.Step):
    def __call__(self, batch):
        for name, part in self.model.items():
            with self.update(name) as update:
                update.backward(part(batch).square().mean())


def two_parts(rate):
    """Return a trainer of two optimizers, and their schedules; `rate` is that of the second."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    rates = {"a": 0.1, "b": rate}
    optim = {name: torch.optim.SGD(model[name].parameters(), lr=lr) for name, lr in rates.items()}
    schedules = {
        "a": torch.optim.lr_scheduler.ExponentialLR(optim["a"], gamma=0.5),
        "b": torch.optim.lr_scheduler.ReduceLROnPlateau(optim["b"], factor=0.5, patience=0),
    }
    hooks = {
        "schedule": LRScheduler(schedule=schedules, metric="eval/loss"),
        "eval": EvalHook(2, function=lambda: {"loss": 1.0}),
    }
    trainer = Trainer(model, optim, [torch.ones(4, 2)] * 4, hooks=hooks, step=Both(), window=2)
    nodes = {name: {"lr": lr} for name, lr in rates.items()}
    trainer.settings = {"optim": nodes, "schedule": {"a": {"gamma": 0.5}, "b": {"factor": 0.5}}}
    return trainer, schedules


def test_one_of_several_optimizers_and_a_schedule_that_waits_for_a_metric():
    trainer, schedules = two_parts(0.1)
    trainer.train(0, 4)  # the second evaluation is not better
    saved = copy.deepcopy(trainer.state_dict())
    other, schedules = two_parts(0.4)
    load_state(other, saved, schedules)
    rates = {name: each.param_groups[0]["lr"] for name, each in other.optimizers.items()}
    assert rates == {"a": 0.1 * 0.5**4, "b": 0.4 * 0.5}
    assert schedules["b"].best == 1.0
    assert schedules["a"].last_epoch == 4
