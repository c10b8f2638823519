"""Models, optimizers and schedules by name in a configuration."""

import pytest
import torch
from torch import nn

from distrain.config.check_keys import _value
from distrain.config.keys import OptimKeys, Target
from distrain.errors import ConfigError
from distrain.job.build import build_parts
from distrain.job.model import _built
from distrain.job.optimization import build_optimization

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2}
ADAM = {"target": "torch.optim.Adam", "lr": 0.1}
COSINE = {"_target_": "distrain.schedule.WarmupCosineLR", "max_iters": 9, "warmup_iters": 0}


def built(optim, schedule=None):
    model = _built({"a": LINEAR, "b": LINEAR})
    optim = _value(optim, OptimKeys | dict[str, OptimKeys] | None, "optim")
    schedule = _value(schedule, Target | dict[str, Target] | None, "schedule")
    return build_optimization({"optim": optim, "schedule": schedule}, model)


def test_one_schedule_is_for_each_optimizer_or_each_has_its_own():
    optimizers, schedules = built({"a": ADAM, "b": ADAM | {"lr": 0.2}}, COSINE)
    assert [s.optimizer for s in schedules.values()] == [*optimizers.values()]
    assert [s.lr_at(0) for s in schedules.values()] == [[0.1], [0.2]]
    optimizers, schedules = built({"a": ADAM, "b": ADAM}, {"b": COSINE})
    assert [type(s).__name__ for s in schedules.values()] == ["WarmupConstantLR", "WarmupCosineLR"]


def test_one_optimizer_over_all_models():
    optimizer, _ = built(ADAM)
    assert isinstance(optimizer, torch.optim.Adam)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize(
    ("optim", "schedule", "message"),
    [
        ({"a": ADAM, "bb": ADAM}, None, r"optim.bb: expected the name of a part of the model; did"),
        ({"a": {"target": "torch.optim.Adam"}, "b": ADAM}, None, "optim.a.lr: expected a value"),
        ({"a": ADAM | {"rules": {"x": {}}}, "b": ADAM}, None, "optim.a.*no match condition"),
        ({"a": ADAM, "b": ADAM}, {"c": COSINE}, "schedule.c: expected the name of an optimizer"),
        ({"a": ADAM, "b": ADAM}, {"b": {"x": 1}}, "schedule.b._target_: expected a value"),
        (ADAM, {"b": COSINE}, "schedule: b: expected one _target_, as there is one optimizer"),
        ({"rules": {"x": {"match": "*"}}}, None, "optim.lr: expected a value"),
    ],
)
def test_mistakes(optim, schedule, message):
    with pytest.raises(ConfigError, match=message):
        built(optim, schedule)


def test_several_models_have_no_metrics(monkeypatch):
    monkeypatch.setattr("distrain.job.build.build_optimization", lambda *_: (None, None))
    monkeypatch.setattr("distrain.job.build.build_datasets", lambda *_: ([], {"clean": []}))

    class Ranks:
        world_size = 1

        def data_ranks(self, ranks):
            return self

    conf = {"trainer": {"accumulation": 1}, "data": {"batch_size": 4}}
    with pytest.raises(ConfigError, match="data.eval: expected null, as a, b have no common"):
        build_parts(
            conf,
            model=nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}),
            strategy=Ranks(),
            ranks=Ranks(),
            run_dir="",
            checkpoints=None,
        )
