"""Parameters that are frozen for a while: the plain loop with requires_grad, on ranks, resumed."""

import pytest
import torch
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrain import Trainer
from distrain.errors import ConfigError
from distrain.hooks import Thaw

STEPS = 8
START = {"0.weight": 3, "0.*": 5}
END = {"2.bias": 6}


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return super().forward(x).square().mean()


def parts(rank):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(rank)
    return model, optimizer, [torch.randn(4, 4) for _ in range(STEPS)]


def plain(rank):
    """The loop in plain PyTorch, which sets requires_grad."""
    model, optimizer, data = parts(rank)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step, batch in enumerate(data):
        for name, parameter in model.named_parameters():
            begin = {"0.weight": 3, "0.bias": 5}.get(name, 0)
            parameter.requires_grad_(begin <= step and not (name == "2.bias" and step >= 6))
        ddp(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def ours_and_plain(rank):
    theirs, their_optimizer = plain(rank)
    model, optimizer, data = parts(rank)
    Trainer(model, optimizer, data, hooks=[Thaw(START, END)], clip_norm=0.5).train(0, STEPS)
    for (name, a), b in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
        mine, other = optimizer.state[a], their_optimizer.state[b[1]]
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    steps = [int(optimizer.state[p]["step"]) for p in model.parameters()]
    assert steps == [STEPS - 3, STEPS - 5, STEPS, 6]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_the_plain_loop_that_sets_requires_grad(world_size):
    run_ranks(ours_and_plain, world_size)


@pytest.mark.ranks
def test_interrupted_is_straight_bit_for_bit(tmp_path):
    start, end = {"net.5.*": 3, "net.0.weight": 7}, {"net.1.*": 9}
    thaw = {"_target_": "distrain.hooks.Thaw", "start": start, "end": end}
    settings = {"hooks": {"thaw": thaw}, "workers": 2}
    broken, whole = run_ranks(interrupted_and_straight, 3, tmp_path, **settings)[0]
    assert differing(broken, whole) == []


def test_mistakes_are_one_line():
    model, optimizer, data = parts(0)
    with pytest.raises(ConfigError, match=r"start.0.\*=-1: expected an integer >= 0"):
        Thaw({"0.*": -1})

    def trained(hook):
        Trainer(model, optimizer, data, hooks={"thaw": hook}).train(0, 1)

    with pytest.raises(ConfigError, match=r"hooks.thaw.end=3.bias: expected .*did you mean 2.bias"):
        trained(Thaw(end={"3.bias": 1}))
    model[0].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="hooks.thaw: 0.bias requires no gradient: expected"):
        trained(Thaw({"0.*": 1}))
