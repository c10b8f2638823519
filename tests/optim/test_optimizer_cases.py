"""The optimizer that is built by default, against torch's plain loops, where fused kernels fail."""

import copy
import math

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn
from torch.nn import functional as F

from distrain import Trainer
from distrain.config.compose import resolve
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook
from distrain.optim.optimizer import build_optimizer

SIZE = 1000  # of a parameter: small enough that freed memory is used again at once
OPTIMIZERS = {
    "sgd": ("torch.optim.SGD", {"lr": 0.1}),
    "momentum": ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("torch.optim.Adam", {"lr": 0.1}),
    "adamw": ("torch.optim.AdamW", {"lr": 0.1}),
    "adagrad": ("torch.optim.Adagrad", {"lr": 0.1}),
    "lars": ("distrain.optim.large_batch.LARS", {"lr": 0.1, "momentum": 0.9, "trust": 0.1}),
    "lamb": ("distrain.optim.large_batch.LAMB", {"lr": 0.1}),
}


class PlainLARS(torch.optim.Optimizer):
    """Algorithm 1 of arXiv:1708.03888, one tensor after the other."""

    def __init__(self, params, lr, momentum, trust):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("sparse")
            lr, trust, momentum = (self.defaults[k] for k in ("lr", "trust", "momentum"))
            ratio = trust * p.norm() / p.grad.norm() if p.dim() > 1 else 1.0
            v = self.state[p].get("v", torch.zeros(p.shape))
            self.state[p]["v"] = v = momentum * v + lr * ratio * p.grad
            p.sub_(v)


class PlainLAMB(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:1904.00962, one tensor after the other."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("sparse")
            zero = torch.zeros(p.shape)
            t, m, v = self.state[p].get("moments", (0, zero, zero))
            t, m, v = t + 1, 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
            self.state[p]["moments"] = t, m, v
            r = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)
            ratio = p.norm() / r.norm() if p.dim() > 1 else 1.0
            p.sub_(self.defaults["lr"] * ratio * r)


def plain(name, parameters):
    """Return torch's loop over tensors, or ours written down again."""
    target, keywords = OPTIMIZERS[name]
    if name in ("lars", "lamb"):
        return {"lars": PlainLARS, "lamb": PlainLAMB}[name](parameters, **keywords)
    make = getattr(torch.optim, target.rpartition(".")[2])
    keywords = {"weight_decay": 0.0} | keywords  # AdamW has another default
    return make(parameters, **keywords, fused=False, foreach=False)


def late(step, place):
    """A gradient for the second parameter from the third step on."""
    return dense() if place == 0 or step >= 2 else None


def disappears(step, place):
    """No gradient for the second parameter in steps 2 and 3."""
    return dense() if place == 0 or step not in (2, 3) else None


def overflow_first(step, place):
    return dense() * (math.inf if step == 0 else 1)


def overflow_later(step, place):
    return dense() * (math.inf if step in (2, 3) else 1)


def overflow_and_late(step, place):
    return overflow_first(step, place) if place == 0 or step >= 2 else None


def transposed_gradient(step, place):
    return torch.randn(SIZE // 10, 10).t()


def sparse(step, place):
    w = torch.zeros(10, SIZE // 10, requires_grad=True)
    F.embedding(torch.randint(10, (3,)), w, sparse=True).sum().backward()
    return w.grad


def dense(*_):
    return torch.randn(10, SIZE // 10)


def contiguous():
    return torch.randn(10, SIZE // 10)


def of_a_transpose():
    return torch.randn(SIZE // 10, 10).t()


def with_gaps():
    return torch.randn(10, SIZE // 5)[:, ::2]


CASES = {
    "late": (late, contiguous),
    "disappears": (disappears, contiguous),
    "overflow in the first step": (overflow_first, contiguous),
    "overflow in later steps": (overflow_later, contiguous),
    "overflow, and late": (overflow_and_late, contiguous),
    "sparse": (sparse, contiguous),
    "strided gradients": (transposed_gradient, contiguous),
    "transposed parameters": (dense, of_a_transpose),
    "parameters with gaps": (dense, with_gaps),
}


def run(make, gradient, parameter):
    """Make six scaled steps of two parameters; return them, or the class of what was raised."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(parameter()) for _ in range(2)])
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=100)
    scaler.scale(torch.zeros(()))  # makes its state
    try:
        for step in range(6):
            for place, p in enumerate(model):
                g = gradient(step, place)
                p.grad = None if g is None else g * scaler.get_scale()
            for _ in range(8):  # what freed memory may hold
                dirt = [torch.full((10, SIZE // 10), math.nan) for _ in range(8)]
                del dirt
            scaler.step(optimizer)
            scaler.update()
    except RuntimeError as error:
        return type(error)
    return [p.detach().clone() for p in model]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_optimizer_equals_the_plain_loop(name, case):
    gradient, parameter = CASES[case]
    target, keywords = OPTIMIZERS[name]
    got = run(lambda model: build_optimizer(model, target=target, **keywords), gradient, parameter)
    expected = run(lambda model: plain(name, list(model)), gradient, parameter)
    if expected is RuntimeError:  # Adam, LARS and LAMB take no sparse gradients
        assert (name, case) in [(n, "sparse") for n in ("adam", "adamw", "lars", "lamb")]
        assert got is expected
        return
    for a, b in zip(got, expected, strict=True):
        assert torch.isfinite(a).all()
        if name in ("lars", "lamb"):  # the order of operations is another
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b)


class Late(nn.Module):
    """Its second layer takes part from the fourth forward on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, 1), nn.Linear(SIZE, 1)
        self.num = 0

    def forward(self, x):
        self.num += 1
        y = self.a(x) + (self.b(x) if self.num > 3 else 0)
        return y.float().pow(2).mean()


@pytest.mark.parametrize("fused", [None, False, True])
def test_fp16_with_an_overflow_and_a_late_layer_trains_like_the_plain_loop(fused):
    torch.manual_seed(0)
    model = Late()
    other = copy.deepcopy(model)
    data = [torch.full((8, SIZE), 100.0)]
    optimizer = build_optimizer(model, lr=1e-7, momentum=0.9, fused=fused)

    def soil():
        dirt = [torch.full((1, SIZE), math.nan) for _ in range(8)]
        del dirt

    hooks = [CallbackHook(after_backward=lambda trainer: soil())]
    trainer = Trainer(model, optimizer, data, precision="fp16", hooks=hooks)
    trainer.train(0, 12)
    assert trainer.scaler.get_scale() < 2.0**16, "nothing overflowed"

    plain_sgd = torch.optim.SGD(other.parameters(), lr=1e-7, momentum=0.9, fused=False)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(12):
        with torch.autocast("cpu", torch.float16):
            loss = other(data[0])
        scaler.scale(loss).backward()
        scaler.step(plain_sgd)
        scaler.update()
        plain_sgd.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if fused else 0, atol=0)
        assert not fused or torch.isfinite(a).all()


def test_fused_sgd_with_dampening_is_refused():
    model = Late()
    optimizer = build_optimizer(model, lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    with pytest.raises(ConfigError, match="optim.fused=true: expected no dampening"):
        Trainer(model, optimizer, [torch.ones(1, SIZE)]).train(0, 1)


def test_fused_false_is_taken_where_there_is_nothing_to_fuse():
    for target in ("torch.optim.RMSprop", "distrain.optim.large_batch.LARS"):
        assert "fused" not in build_optimizer(Late(), target=target, lr=0.1, fused=False).defaults
        with pytest.raises(ConfigError, match="fused: .* takes no 'fused'"):
            build_optimizer(Late(), target=target, lr=0.1, fused=True)


@pytest.mark.parametrize("choice", ["sgd", "adamw", "lars", "lamb"])
def test_fused_is_a_key_of_each_optimizer(choice):
    with initialize_config_module("distrain.conf", version_base=None):
        overrides = ["+experiment=digits", f"optim={choice}", "optim.fused=false", "run.name=a"]
        conf = resolve(compose("config", overrides))
    assert conf["optim"]["fused"] is False
