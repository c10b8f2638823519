"""AdamW of torchao with states of 8 bits: the plain loop, saved as plain tensors, resumed."""

import pytest
import torch
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from torch import nn
from torchao.optim import AdamW8bit

from distrain import Trainer
from distrain.optim.optimizer import build_optimizer


def in_eager(function):
    """Its step is compiled, which takes half a minute on a CPU."""

    def called(*args, **keywords):
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **keywords)

    return called


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x):
        return super().forward(x).square().mean()


@in_eager
def test_it_is_the_plain_loop():
    torch.manual_seed(0)
    model, ours = Net(), Net()
    ours.load_state_dict(model.state_dict())
    data = [torch.randn(8, 64) for _ in range(4)]
    optimizer = AdamW8bit(model.parameters(), lr=0.01, weight_decay=0.1)
    for batch in data:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer = build_optimizer(ours, target="torchao.optim.AdamW8bit", lr=0.01, weight_decay=0.1)
    Trainer(ours, optimizer, data).train(0, 4)
    assert all(map(torch.equal, ours.parameters(), model.parameters()))


@pytest.mark.ranks
def test_interrupted_is_straight_bit_for_bit(tmp_path):
    optim = {"target": "torchao.optim.AdamW8bit", "lr": 0.01, "weight_decay": 0.1}
    settings = {"optim": optim, "model": {"width": 96}, "workers": 2}
    call = in_eager(interrupted_and_straight)
    broken, whole = run_ranks(call, 2, tmp_path, **settings)[0]
    assert differing(broken, whole) == []
    codes = [
        v["exp_avg"]["codes"].dtype
        for v in whole["optimizer"]["state"].values()
        if isinstance(v["exp_avg"], dict)
    ]
    assert codes == [torch.uint8], "one tensor is large enough"
