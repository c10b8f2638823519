"""Schedules built of others, and ReduceLROnPlateau on the result of an evaluation."""

import pytest
import torch
from ranks import run_ranks
from resume_cases import ITERS, SCHEDULES, differing, interrupted_and_straight
from torch import nn
from torch.optim import lr_scheduler as theirs

from distrain import HookBase, Trainer
from distrain.config.instantiate import build_nested
from distrain.data.loader import EvalLoader
from distrain.errors import ConfigError
from distrain.hooks import EvalHook, LRScheduler
from distrain.schedule import WarmupConstantLR


def sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)


def test_a_chain_is_written_as_in_torch_and_gives_the_same_rates():
    mine, other = sgd(), sgd()
    chain = build_nested(SCHEDULES[-1], "schedule", optimizer=mine)
    parts = [
        theirs.LinearLR(other, total_iters=3),
        theirs.CosineAnnealingLR(other, T_max=4),
        theirs.LinearLR(other, 1.0, 0.0, 9),
    ]
    expected = theirs.SequentialLR(other, parts, [3, 7])
    for _ in range(ITERS):
        assert chain.get_last_lr() == pytest.approx(expected.get_last_lr(), rel=1e-9)
        for schedule in (chain, expected):
            schedule.optimizer.step()
            schedule.step()


PLATEAU = {
    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "mode": "max",
    "factor": 0.5,
    "patience": 0,
}
VALUES = {2: 1.0, 4: 2.0, 6: 2.0, 8: 1.0, 10: 3.0, 12: 2.5}


class Report(HookBase):
    """Reports a metric every second iteration, where an evaluation would."""

    order = 60

    def after_step(self):
        if self.trainer.iter_done in VALUES:
            self.trainer.report_metrics({"eval/x": VALUES[self.trainer.iter_done]})


def test_the_rate_falls_where_the_metric_does_not_improve_and_resumes_bit_for_bit(tmp_path):
    hooks = {"schedule": {"metric": "eval/x"}, "report": {"_target_": f"{__name__}.Report"}}
    settings = {"schedule": PLATEAU, "hooks": hooks}
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, **settings)[0]
    assert differing(broken, whole) == []
    rates = [0.05] * 6 + [0.025] * 2 + [0.0125] * 4
    assert whole["histories"]["lr"]["values"].tolist() == rates
    assert whole["optimizer"]["param_groups"][0]["lr"] == 0.00625, "the last value counts"


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([float(index), 1.0])


class Line(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        nn.init.ones_(self.weight)

    def forward(self, x):
        return (super().forward(x) - 3).square().mean()


def test_it_is_the_plain_loop_with_an_evaluation_every_two_steps():
    data = [torch.stack([Data()[i] for i in range(8)])]

    def parts():
        torch.manual_seed(0)
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        plateau = theirs.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5)
        return model, optimizer, plateau

    model, optimizer, plateau = parts()
    for step in range(1, 9):
        model(data[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            with torch.no_grad():
                plateau.step(model(data[0]).item())
    mine, optimizer_, plateau_ = parts()
    hooks = [
        EvalHook(2, eval_loader=EvalLoader(Data(), batch_size=8)),
        LRScheduler(plateau_, metric="eval/loss"),
    ]
    Trainer(mine, optimizer_, data, hooks=hooks).train(0, 8)
    assert plateau_.state_dict() == plateau.state_dict()
    assert optimizer.param_groups[0]["lr"] < 0.03
    assert all(map(torch.equal, mine.parameters(), model.parameters()))


def test_an_unknown_metric_is_one_line():
    model = Line()
    plateau = theirs.ReduceLROnPlateau(torch.optim.SGD(model.parameters(), lr=0.03))
    hooks = {
        "eval": EvalHook(2, eval_loader=EvalLoader(Data(), batch_size=8)),
        "schedule": LRScheduler(plateau, metric="eval/lost"),
    }
    trainer = Trainer(model, plateau.optimizer, [Data()[0][None]], hooks=hooks)
    with pytest.raises(
        ConfigError, match="hooks.schedule.metric=eval/lost: expected .*did you mean eval/loss"
    ):
        trainer.train(0, 4)


def test_only_nested_building_hands_the_optimizer_down():
    node = {
        "_target_": "builtins.dict",
        "inner": {"_target_": "distrain.schedule.WarmupConstantLR"},
    }
    assert isinstance(build_nested(node, "x", optimizer=sgd())["inner"], WarmupConstantLR)
