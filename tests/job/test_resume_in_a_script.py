"""`distrain.resume`: a script continues from its newest checkpoint."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import distrain
from distrain.errors import ConfigError, RunRefused
from distrain.hooks import EMA, BestCheckpointer, LRScheduler, PeriodicCheckpointer


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear, self.drop = nn.Linear(3, width), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x)).square().mean()


def script(folder, until, rank=0, ranks=1):
    torch.manual_seed(0)
    data = torch.randn(24, 3)
    model = Net()
    torch.manual_seed(rank)  # of dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = distrain.WarmupCosineLR(optimizer, max_iters=20, warmup_iters=3)
    sampler = DistributedSampler(data, num_replicas=ranks, rank=rank)
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    checkpoints = distrain.CheckpointStore(folder / "checkpoints")
    hooks = {
        "schedule": LRScheduler(schedule),
        "ema": EMA(0.9),
        "checkpoint": PeriodicCheckpointer(4, checkpoints=checkpoints),
    }
    trainer = distrain.Trainer(model, optimizer, loader, hooks=hooks)
    first = distrain.resume(trainer, checkpoints)
    trainer.train(first, until)
    return first, trainer.state_dict()


def stopped_and_straight(rank, folder, ranks):
    _, straight = script(folder / "straight", 15, rank, ranks)
    script(folder / "stopped", 7, rank, ranks)
    first, resumed = script(folder / "stopped", 15, rank, ranks)
    torch.testing.assert_close(resumed["model"], straight["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"], straight["optimizer"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["hooks"], straight["hooks"], rtol=0, atol=0)
    assert resumed["schedule"] == straight["schedule"]
    return first


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_script_has_the_bits_of_a_straight_one(tmp_path, ranks):
    assert run_ranks(stopped_and_straight, ranks, tmp_path, ranks) == [7] * ranks


def test_another_model_is_refused(tmp_path):
    script(tmp_path, 4)
    model = Net(width=5)
    store = distrain.CheckpointStore(tmp_path / "checkpoints")
    trainer = distrain.Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(3)])
    with pytest.raises(RunRefused, match=r"linear.weight is \[4, 3\], here \[5, 3\]"):
        distrain.resume(trainer, store)


def test_another_optimizer_is_refused(tmp_path):
    script(tmp_path, 4)
    model = Net()
    groups = [{"params": [each]} for each in model.parameters()]
    trainer = distrain.Trainer(model, torch.optim.SGD(groups, lr=0.1), [torch.ones(3)])
    with pytest.raises(
        RunRefused, match="iteration 4 does not fit this trainer: .*parameter group"
    ):
        distrain.resume(trainer, distrain.CheckpointStore(tmp_path / "checkpoints"))


def reversed_state(optimizer, state):
    order = state["param_groups"][0]["params"][::-1]
    entries = {new: state["state"][old] for new, old in enumerate(order)}
    return {**state, "state": entries}


def test_a_hook_of_the_optimizer_may_put_its_state_in_order():
    def trainer(order):
        model = Net()
        optimizer = torch.optim.AdamW([*model.parameters()][::order], lr=0.1)
        if order == -1:
            optimizer.register_load_state_dict_pre_hook(reversed_state)
        return distrain.Trainer(model, optimizer, [torch.ones(3)])

    before, now = trainer(1), trainer(-1)
    before.train(0, 2)
    now.load_state_dict(before.state_dict())
    moments = [
        [each.optimizer.state[p]["exp_avg"].tolist() for p in each.module.parameters()]
        for each in (before, now)
    ]
    assert moments[0] == moments[1]


@pytest.mark.parametrize("hook", [PeriodicCheckpointer, lambda **kw: BestCheckpointer("a", **kw)])
def test_a_script_that_does_not_resume_is_refused_beside_checkpoints(tmp_path, hook):
    script(tmp_path, 4)
    model = Net()
    store = distrain.CheckpointStore(tmp_path / "checkpoints")
    hooks = [hook(checkpoints=store)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = distrain.Trainer(model, optimizer, [torch.ones(3)], hooks=hooks)
    with pytest.raises(ConfigError, match=r"it holds iteration 4: continue with .*resume"):
        trainer.train(0, 4)


class Pair(nn.Module):
    """Two layers of one shape, made in an order; those that do not count are frozen."""

    def __init__(self, order="ab", trained="ab"):
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(3, 3).requires_grad_(name in trained))

    def forward(self, x):
        return self.b(self.a(x)).square().mean()


def trainer_of(model, checkpoints):
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    hooks = [PeriodicCheckpointer(checkpoints=checkpoints)]
    return distrain.Trainer(model, optimizer, [torch.ones(3)], hooks=hooks)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"order": "ab"}, {"order": "ba"}),
        ({"trained": "a"}, {"trained": "b"}),
    ],
)
def test_no_parameter_gets_the_state_of_another(tmp_path, before, now):
    checkpoints = distrain.CheckpointStore(tmp_path / "checkpoints")
    trainer_of(Pair(**before), checkpoints).train(0, 2)
    trainer = trainer_of(Pair(**before), checkpoints)
    assert distrain.resume(trainer, checkpoints) == 2
    with pytest.raises(
        RunRefused, match=r"states of other parameters.*: a.weight \(here b.weight\)"
    ):
        distrain.resume(trainer_of(Pair(**now), checkpoints), checkpoints)


@pytest.mark.parametrize("hook", [PeriodicCheckpointer, lambda **kw: BestCheckpointer("a", **kw)])
def test_a_path_in_place_of_a_store_is_one_line(hook):
    with pytest.raises(ConfigError, match=r"checkpoints=runs/x: expected a CheckpointStore"):
        hook(checkpoints="runs/x")
