"""Schedule-free optimizers: the plain loop, evaluated on the average without a trace, resumed."""

import pytest
import torch
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from schedulefree import AdamWScheduleFree
from torch import nn

from distrain import Trainer
from distrain.errors import ConfigError
from distrain.hooks import EvalHook, PreciseBN, ScheduleFree
from distrain.optim.optimizer import build_optimizer

STEPS = 6


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return super().forward(x).square().mean()


def parts():
    torch.manual_seed(0)
    return Net(), [torch.randn(4, 4) for _ in range(STEPS)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_is_the_plain_loop_and_evaluates_the_average():
    model, data = parts()
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.05, warmup_steps=2)
    optimizer.train()
    for batch in data:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = weights(model)
    optimizer.eval()
    averaged = weights(model)

    ours, data = parts()
    target = "schedulefree.AdamWScheduleFree"
    optimizer = build_optimizer(ours, target=target, lr=0.05, warmup_steps=2)
    seen = []
    evaluation = EvalHook(2, function=lambda: {"x": seen.append(weights(ours)) or 0.0})
    hook = ScheduleFree()
    trainer = Trainer(ours, optimizer, data, hooks=[evaluation, hook])
    trainer.train(0, STEPS)
    assert torch.equal(weights(ours), trained), "an evaluation leaves no trace"
    assert len(seen) == 3
    assert torch.equal(seen[-1], averaged)
    average = hook.state_dict()["average"]
    assert torch.equal(torch.cat([w.flatten() for w in average.values()]), averaged)
    assert not torch.equal(averaged, trained)


@pytest.mark.ranks
def test_interrupted_is_straight_bit_for_bit(tmp_path):
    hooks = {
        "schedule_free": {"_target_": "distrain.hooks.ScheduleFree"},
        "precise_bn": {"_target_": "distrain.hooks.PreciseBN", "num_iters": 2, "period": 3},
    }
    sgd = {"match": "net.5.*", "target": "torch.optim.SGD"}
    optim = {"target": "schedulefree.SGDScheduleFree", "lr": 0.1, "groups": {"sgd": sgd}}
    settings = {"hooks": hooks, "optim": optim}
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, **settings)[0]
    assert differing(broken, whole) == []
    average, own = whole["hooks"]["schedule_free"]["average"], whole["model"]
    assert torch.equal(average["net.5.weight"], own["net.5.weight"]), "plain SGD has no average"
    for name in ("net.0.weight", "net.1.running_mean"):
        assert not torch.equal(average[name], own[name])


def test_another_optimizer_is_refused_in_one_line():
    model, data = parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = {"schedule_free": ScheduleFree(), "bn": PreciseBN()}
    with pytest.raises(ConfigError, match="hooks.schedule_free: expected an optimizer of the pack"):
        Trainer(model, optimizer, data, hooks=hooks).train(0, 1)
