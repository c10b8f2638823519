"""LARS and LAMB: numbers by hand, against plain loops over single tensors, resumed."""

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from kernels import Kernels
from torch import nn

from distrain.errors import ConfigError
from distrain.optim.large_batch import LAMB, LARS
from distrain.optim.optimizer import build_optimizer

CONF = Path(__file__).parents[2] / "conf" / "optim"


def row(*values):
    return nn.Parameter(torch.tensor([values], dtype=torch.float64))


def test_one_update_of_lars_by_hand():
    w = row(3.0, 4.0)
    w.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    LARS([w], lr=0.1, momentum=0.9, weight_decay=0.1, trust=0.3).step()
    torch.testing.assert_close(w.detach(), torch.tensor([[2.97, 3.86]]).double())


def test_two_updates_of_lars_keep_the_rate_of_each_in_the_momentum():
    w = row(3.0, 4.0)
    optimizer = LARS([w], lr=0.1, momentum=0.5, trust=0.2)
    w.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    optimizer.step()  # ratio 0.2 * 5 / 1 = 1, v = (0, 0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # v = (0, 0.05), though the rate is 0
    torch.testing.assert_close(w.detach(), torch.tensor([[3.0, 3.85]]).double())


def test_one_update_of_lamb_by_hand():
    w = row(3.0, 4.0)
    w.grad = torch.tensor([[2.0, -5.0]], dtype=torch.float64)
    LAMB([w], lr=0.1, weight_decay=0.5, eps=0.0).step()
    ratio = 5 / math.sqrt(2.5**2 + 1)
    expected = torch.tensor([[3 - 0.1 * ratio * 2.5, 4 - 0.1 * ratio]]).double()
    torch.testing.assert_close(w.detach(), expected)


def plain_lars(w, g, state, *, lr, momentum, decay, trust, adapts):
    of_w, of_g = w.norm().item(), g.norm().item()
    ratio = trust * of_w / (of_g + decay * of_w) if adapts and of_w and of_g else 1.0
    state["v"] = momentum * state.get("v", 0) + lr * ratio * (g + decay * w)
    return w - state["v"]


def plain_lamb(w, g, state, *, lr, betas, eps, decay, adapts):
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g * g
    root = (state["v"] / (1 - betas[1] ** t)).sqrt() + eps
    r = state["m"] / (1 - betas[0] ** t) / root + decay * w
    of_w, of_r = w.norm().item(), r.norm().item()
    return w - lr * (of_w / of_r if adapts and of_w and of_r else 1.0) * r


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
        self.zeros = nn.Parameter(torch.zeros(2, 2))  # a norm of 0 has no ratio
        self.rare = nn.Parameter(torch.ones(2, 2))  # has a gradient in every second update only

    def loss(self, x, t):
        y = self.net(x).square().mean() + (self.zeros - 1).square().sum()
        return y + self.rare.square().sum() if t % 2 else y


def updates(model, optimizer, first=0, last=6):
    for t in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).double()
        model.loss(x, t).backward()
        optimizer.step()


def settings(name):
    """Return those of conf/optim, with a rate at which something happens."""
    conf = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    numbers = {key: float(value) for key, value in conf.items() if key in ("lr", "eps")}
    numbers["weight_decay"] = float(conf["weight_decay"])
    return {**conf, **numbers, "lr": {"lars": 3.0, "lamb": 0.1}[name], "layer_decay": None}


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("adapt", [None, True, False])
def test_lists_of_tensors_give_what_plain_loops_over_single_ones_give(name, adapt):
    conf = {**settings(name), "adapt": adapt}
    model, plain = net(), net()
    optimizer = build_optimizer(model, **conf)
    assert type(optimizer).__name__ == name.upper()
    states = [{} for _ in plain.parameters()]
    for t in range(6):
        updates(model, optimizer, t, t + 1)
        for p in plain.parameters():
            p.grad = None
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).double()
        plain.loss(x, t).backward()
        for p, state in zip(plain.parameters(), states, strict=True):
            if p.grad is None:
                continue
            shared = {
                "lr": conf["lr"],
                "decay": conf["weight_decay"] if p.dim() > 1 else 0.0,  # norms, biases
                "adapts": p.dim() > 1 if adapt is None else adapt,
            }
            if name == "lars":
                more = {"momentum": 0.9, "trust": 0.001}
                p.data = plain_lars(p.data, p.grad, state, **shared, **more)
            else:
                more = {"betas": (0.9, 0.999), "eps": 1e-6}
                p.data = plain_lamb(p.data, p.grad, state, **shared, **more)
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=key)
        assert not torch.equal(ours, dict(net().named_parameters())[key]), "it has learnt"


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_resumed_optimizer_goes_on_with_the_same_bits(name):
    conf = settings(name)
    straight = net()
    updates(straight, build_optimizer(straight, **conf))
    first = net()
    optimizer = build_optimizer(first, **conf)
    updates(first, optimizer, 0, 3)
    second = copy.deepcopy(first)
    resumed = build_optimizer(second, **conf)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    updates(second, resumed, 3, 6)
    for a, b in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_nothing_is_read_back(name):
    model = net()
    optimizer = build_optimizer(model, **settings(name))
    updates(model, optimizer, 0, 2)
    with Kernels() as seen:
        optimizer.step()
    assert "aten::_foreach_norm.Scalar" in seen.names
    assert not [n for n in seen.names if "_local_scalar_dense" in n or "is_nonzero" in n]


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_half_precision_norms_do_not_overflow(name):
    w = nn.Parameter(torch.full((300, 300), 300.0, dtype=torch.float16))  # its norm is 90,000
    w.grad = torch.full_like(w, 1.0)
    make = {"lars": LARS, "lamb": LAMB}[name]
    make([w], lr=torch.tensor(0.01), **({"trust": 0.1} if name == "lars" else {})).step()
    # both ratios are 300: w = 300 - 0.01 * 300, for LARS with trust 0.1 a tenth of that
    expected = {"lars": 300 - 0.3, "lamb": 300 - 3.0}[name]
    torch.testing.assert_close(w.detach(), torch.full_like(w, expected), rtol=1e-3, atol=0)


def test_a_rule_may_take_a_group_out():
    rules = {"head": {"match": "net.3.weight", "adapt": False}}
    optimizer = build_optimizer(Net(), **{**settings("lars"), "rules": rules})
    assert [group["adapt"] for group in optimizer.param_groups if group["name"] == "head"] == [
        False
    ]


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        (LARS, {"trust": 0}, "trust=0: expected a finite number"),
        (LARS, {"momentum": -1}, "momentum=-1: expected a finite number"),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): expected two numbers in \[0, 1\)"),
        (LAMB, {"eps": -1}, "eps=-1: expected a finite number"),
    ],
)
def test_mistakes(make, keywords, message):
    with pytest.raises(ConfigError, match=message):
        make([row(1.0)], lr=0.1, **keywords)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="LARS takes no sparse gradients"):
        LARS(table.parameters(), lr=0.1).step()
