"""Several optimizers in one: `optim.groups`, against plain loops with several optimizers."""

import pytest
import torch
from fsdp_cases import Data, Model
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from torch import nn

from distrain import Trainer
from distrain.errors import ConfigError
from distrain.hooks import LRScheduler
from distrain.optim.combined import CombinedOptimizer
from distrain.optim.optimizer import build_optimizer, explain_optimizer

MUON = {
    "target": "torch.optim.AdamW",
    "lr": 0.05,
    "weight_decay": 0.1,
    "weight_decay_norm": 0.0,
    "groups": {
        "matrices": {
            "match": "blocks.*",
            "dims": 2,
            "target": "torch.optim.Muon",
            "lr": 0.02,
        },
        "tables": None,
    },
}


def plain(optimizers, model, data, *, steps=5, clip=0.1):
    """The loop of two optimizers and one schedule of each, as a script has it."""
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in optimizers]
    for _ in range(steps):
        for _ in range(2):
            (model(next(data)) / 2).backward()
        groups = (group for each in optimizers for group in each.param_groups)
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()


def test_matrices_by_muon_and_the_rest_by_adamw_are_the_plain_loop():
    torch.manual_seed(0)
    theirs, ours = Model(), Model()
    ours.load_state_dict(theirs.state_dict())
    matrices = [p for n, p in theirs.named_parameters() if n.startswith("blocks") and p.dim() == 2]
    taken = {*map(id, matrices)}
    norms = [p for n, p in theirs.named_parameters() if ".norm." in n]
    taken |= {*map(id, norms)}
    rest = [p for p in theirs.parameters() if id(p) not in taken]
    decayed = {"weight_decay": 0.1}
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, **decayed),
        torch.optim.AdamW(
            [{"params": rest}, {"params": norms, "weight_decay": 0.0}], 0.05, **decayed
        ),
    ]
    plain(optimizers, theirs, (x.float() for x in Data(0).batches(0)))

    optimizer = build_optimizer(ours, **MUON)
    assert isinstance(optimizer, CombinedOptimizer)
    assert [g["name"] for g in optimizer.param_groups] == ["matrices", "default", "norm"]
    hooks = [LRScheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))]
    data = [x.float() for x, _ in zip(Data(0).batches(0), range(10), strict=False)]
    Trainer(ours, optimizer, data, hooks=hooks, accumulation=2, clip_norm=0.1).train(0, 5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    rows = {row.name: row for row in explain_optimizer(ours, **MUON)}
    assert rows["blocks.0.linear.weight"].group == "matrices"
    assert rows["blocks.0.linear.weight"].why == "weight; Muon"
    assert (rows["blocks.0.norm.weight"].group, rows["inside.weight"].lr) == ("norm", 0.05)


def test_interrupted_is_straight_bit_for_bit(tmp_path):
    groups = {
        "kernels": {
            "match": "net.0.*",
            "target": "torch.optim.SGD",
            "momentum": 0.9,
            "fused": True,
        },
        "matrices": {"dims": 2, "target": "torch.optim.Muon", "lr": 0.02},
    }
    optim = {"target": "torch.optim.AdamW", "lr": 0.05, "betas": [0.8, 0.9], "groups": groups}
    schedule = {"_target_": "distrain.schedule.WarmupCosineLR", "max_iters": 12, "warmup_iters": 4}
    settings = {"optim": optim, "schedule": schedule, "workers": 2}
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, **settings)[0]
    assert differing(broken, whole) == []
    state = whole["optimizer"]
    assert [g["name"] for g in state["param_groups"]] == ["kernels", "matrices", "norm+bias"]
    assert {key for each in state["state"].values() for key in each} >= {
        "momentum_buffer",
        "exp_avg_sq",
    }


def sharded(rank, strategy):
    torch.manual_seed(0)
    model = Model().double()
    trainer = Trainer(
        model, build_optimizer(model, **MUON), Data(rank), strategy=strategy, accumulation=2
    )
    trainer.train(0, 4)
    return trainer.state_dict()["model"]


def both_strategies(rank):
    return sharded(rank, "ddp"), sharded(rank, "fsdp")


def test_sharded_it_is_the_same():
    ddp, fsdp = run_ranks(both_strategies, 2)[0]
    for name, weight in ddp.items():
        torch.testing.assert_close(fsdp[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (
            {"a": {"match": "heed.*"}},
            r"groups.a: matches no parameter: match=heed.\* \(did you mean",
        ),
        ({"a": {"lr": 1}}, "groups.a: no match condition; give match, module or dims"),
        ({"a": {"dims": "x", "lr": 1}}, "groups.a.dims=x: expected an integer >= 1"),
        (
            {"a": {"match": "*"}},
            "groups: expected parameters left for target=.*AdamW; all are in a",
        ),
        ({"a": {"match": "*"}, "b": {"dims": 1}}, "groups.b: matches no parameter: dims=1"),
        ({"a": {"dims": 1, "target": "torch.optim.Muon"}}, "groups.a: torch.optim.Muon refuses"),
        ({"a": {"dims": 1, "target": "Muno"}}, "groups.a.target=Muno: .*did you mean Muon"),
        (
            {"a": {"dims": 1, "target": "torch.optim.SGD", "beta": 1}},
            "groups.a.beta: torch.optim.SG",
        ),
        ({"a": 3}, "groups.a: expected a mapping"),
    ],
)
def test_mistakes_are_one_line(groups, text):
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=text):
        build_optimizer(model, target="torch.optim.AdamW", lr=0.1, groups=groups)
