"""Optimizers of any class over our groups, clipping, and the group that stands for the run."""

import copy

import pytest
import torch
from torch import nn

from distrain.errors import ConfigError
from distrain.optim.groups import param_groups
from distrain.optim.optimizer import build_optimizer, representative_group


class Net(nn.Module):
    """A convolution, a norm and a head; all sizes beyond one SIMD register."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)  # behind a norm its gradient is but rounding
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one number from images (N, 3, H, W)."""
        return self.head(self.norm(self.conv(x)).mean((2, 3))).square().mean()


def train(model, optimizer, updates=5, memory_format=torch.contiguous_format):
    """Make some updates on the same random images and return the parameters."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(updates):
        images = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(images.to(memory_format=memory_format)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_the_optimizer_has_the_groups_and_the_keywords():
    model = Net()
    rules = {"head": {"match": "head.*", "lr_factor": 10, "betas": [0.5, 0.6]}}
    optimizer = build_optimizer(
        model,
        target="torch.optim.AdamW",
        lr=1,
        weight_decay=0.1,
        weight_decay_norm=0,
        betas=[0.8, 0.9],
        rules=rules,
    )
    assert type(optimizer) is torch.optim.AdamW
    got = [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups]
    assert got == [
        ("default", 1.0, 0.1, (0.8, 0.9)),
        ("norm", 1.0, 0.0, (0.8, 0.9)),
        ("head", 10.0, 0.1, (0.5, 0.6)),
    ]
    kwargs = {"lr": 1, "weight_decay": 0.1, "weight_decay_norm": 0, "rules": rules}
    for ours, theirs in zip(param_groups(model, **kwargs), optimizer.param_groups, strict=True):
        assert all(a is b for a, b in zip(ours["params"], theirs["params"], strict=True))


def test_one_update_by_hand():
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = build_optimizer(
        model, lr=0.1, weight_decay=0.5, bias_lr_factor=2.0, weight_decay_bias=0
    )
    model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
    optimizer.step()
    assert model.weight.item() == pytest.approx(1 - 0.1 * (1 + 0.5))
    assert model.bias.item() == pytest.approx(1 - 0.2)


@pytest.mark.parametrize("target", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_when_asked_for_gives_the_plain_numbers_to_rounding(target, memory_format):
    model = Net().to(memory_format=memory_format)
    plain = copy.deepcopy(model)
    keywords = {"target": f"torch.optim.{target}", "lr": 0.05, "weight_decay": 0.01}
    if target == "SGD":
        keywords["momentum"] = 0.9
    optimizer = build_optimizer(model, **keywords, fused=True)
    assert all(group["fused"] for group in optimizer.param_groups)
    default = build_optimizer(plain, **keywords)
    assert not any(group["fused"] or group["foreach"] for group in default.param_groups)
    for a, b in zip(
        train(model, optimizer, memory_format=memory_format),
        train(plain, default, memory_format=memory_format),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_is_updated_in_every_element():
    model = Net().bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, build_optimizer(model, lr=1.0), updates=3)
    assert (before[0] != after[0]).float().mean() > 0.9


class Any_(torch.optim.SGD):
    """An optimizer that takes any keyword."""

    def __init__(self, params, lr, **keywords):
        self.keywords = keywords
        super().__init__(params, lr)


def test_an_optimizer_of_the_user_with_open_keywords():
    optimizer = build_optimizer(Net(), target=f"{__name__}.Any_", lr=0.1, strange=[1, [2]])
    assert optimizer.keywords == {"strange": (1, (2,)), "weight_decay": 0.0}
    assert optimizer.param_groups[0]["fused"] is None


def test_an_optimizer_without_weight_decay():
    target = "torch.optim.LBFGS"
    optimizer = build_optimizer(Net(), target=target, lr=0.1)
    assert "weight_decay" not in optimizer.param_groups[0]
    with pytest.raises(ConfigError, match="torch.optim.LBFGS has no weight decay"):
        build_optimizer(Net(), target=target, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"target": "SGD"}, "target=SGD: expected the import path .*.torch.optim.SGD."),
        ({"target": "Sgd"}, "target=Sgd: expected the import path .*did you mean SGD"),
        ({"target": "torch.optim.AdmW"}, "target=torch.optim.AdmW: expected .*did you mean AdamW"),
        ({"target": "no_such_package.Adam"}, "target=no_such_package.Adam: expected the import"),
        ({"target": "torch.nn.Linear"}, "target=torch.nn.Linear: expected a class of"),
        ({"target": 3}, "target=3: expected the import path"),
        (
            {"momentun": 0.9},
            "momentun: torch.optim.SGD takes no 'momentun' .did you mean momentum.*allowed",
        ),
        ({"betas": [0.9, 0.99]}, "betas: torch.optim.SGD takes no 'betas'"),
        ({"momentum": -1}, "torch.optim.SGD refuses its settings: Invalid momentum"),
        ({"momentum": [1]}, "torch.optim.SGD refuses its settings"),
        ({"target": "torch.optim.RMSprop", "fused": True}, "fused: torch.optim.RMSprop takes no"),
        ({"rules": {"h": {"match": "*", "beta": 1}}}, "rules.h.beta: torch.optim.SGD takes no"),
        ({"lr": 0}, "lr=0: expected a finite number > 0"),
        ({"lr": "0.1"}, "lr='0.1': expected a finite number > 0, without quotes"),
        ({"lr": True}, "lr=true: expected"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected a finite number"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_is_allowed(keywords, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(Net(), **{"lr": 0.1, **keywords})


def sgd(sizes, rates):
    groups = [
        {"params": [torch.zeros(1, requires_grad=True) for _ in range(size)], "lr": rate}
        for size, rate in zip(sizes, rates, strict=True)
    ]
    return torch.optim.SGD(groups)


def test_the_representative_group():
    assert representative_group(sgd([1, 3, 2], [0.1, 0.2, 0.3])) == 1
    assert representative_group(sgd([2, 2], [0.1, 0.2])) == 0
    assert representative_group(sgd([1, 1, 1], [0.1, 0.2, 0.2])) == 1
    assert representative_group(sgd([1, 3, 2], [0.1, 0.0, 0.3])) == 2, "the second is frozen"
    assert representative_group(sgd([1, 1, 1], [0.0, 0.0, 0.2])) == 2
    assert representative_group(sgd([1, 3], [0.0, 0.0])) == 1
    frozen = sgd([1, 3, 2], [0.1, 0.2, 0.3])
    for p in frozen.param_groups[1]["params"]:
        p.requires_grad = False
    assert representative_group(frozen) == 2
    optimizer = sgd([1, 1, 1], [0.1, 0.1, 0.1])
    for group, initial in zip(optimizer.param_groups, [1.0, 2.0, 2.0], strict=True):
        group["initial_lr"] = initial
    assert representative_group(optimizer) == 1
    assert representative_group(sgd([1, 1], [torch.tensor(0.1), torch.tensor(0.2)])) == 0
