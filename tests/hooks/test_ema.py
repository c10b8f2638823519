"""The moving average of the weights: numbers by hand, evaluated, equal on ranks, resumed."""

import copy

import pytest
import torch
from kernels import Kernels
from ranks import run_ranks
from torch import nn

from distrain import Trainer
from distrain.errors import ConfigError
from distrain.hooks import EMA, CallbackHook, EvalHook


class One(nn.Module):
    """Its weight goes 1, 2, 3, ... with SGD of rate 1; a buffer counts forwards."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        self.calls += 1
        return -self.w.sum()


def train(*hooks, steps=10, model=None, start=0, state=None):
    model = model or One()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, optimizer, [torch.ones(2, 4)], hooks=hooks)
    if state is not None:
        trainer.load_state_dict(state)
    trainer.train(start, steps)
    trainer.reduction.drain(trainer.storage.iter)
    return trainer


def average(ema):
    return ema.state_dict()["average"]["w"].item()


def test_the_average_by_hand():
    ema = EMA(0.5, warmup=False)
    train(ema, steps=4)  # 1, 1.5, 2.25, 3.125
    assert average(ema) == 3.125
    assert ema.state_dict()["updates"] == 4


def test_the_decay_begins_small():
    ema = EMA(0.5, warmup=True)
    train(ema, steps=3)  # 1; 2/11 * 1 + 9/11 * 2; 3/12 of it + 9/12 * 3
    assert average(ema) == pytest.approx(0.25 * (2 / 11 + 18 / 11) + 2.25)


def test_every_second_iteration_with_the_square_of_the_decay():
    ema = EMA(0.5, warmup=False, period=2)
    train(ema, steps=5)  # 2 after two; 0.25 * 2 + 0.75 * 4 after four
    assert average(ema) == 3.5


def evaluate(trainer):
    """Return the model's weight, and what forwards have counted, as metrics."""
    return {"w": trainer.module.w.item(), "calls": trainer.module.calls.item()}


def train_and_evaluate(**keywords):
    hooks = [EMA(0.5, warmup=False, **keywords)]
    evaluation = EvalHook(2, function=lambda: evaluate(evaluation.trainer))
    trainer = train(*hooks, evaluation, steps=4)
    return trainer, {name: h.values() for name, h in trainer.storage.histories().items()}


def test_evaluated_beside_the_weights():
    trainer, histories = train_and_evaluate()
    assert histories["eval/w"] == [(2.0, 1), (4.0, 3)]
    assert histories["eval_EMA/w"] == [(1.5, 1), (3.125, 3)]
    assert histories["eval_EMA/calls"] == [(2.0, 1), (4.0, 3)]  # buffers are the model's
    assert trainer.module.w.item() == 4.0


def test_evaluated_instead_of_the_weights():
    _, histories = train_and_evaluate(evaluate="instead")
    assert histories["eval/w"] == [(1.5, 1), (3.125, 3)]
    assert "eval_EMA/w" not in histories


def test_before_the_first_update_the_weights_are_evaluated():
    _, histories = train_and_evaluate(evaluate="instead", period=3)
    assert histories["eval/w"] == [(2.0, 1), (3.0, 3)]


def test_the_weights_come_back_after_a_failure():
    ema = EMA(0.5, warmup=False)
    trainer = train(ema, steps=4)
    with pytest.raises(KeyError), ema.applied():
        assert trainer.module.w.item() == 3.125
        raise KeyError
    assert trainer.module.w.item() == 4.0


def test_two_averages_have_tags_of_their_own_but_one_place():
    evaluation = EvalHook(2, function=lambda: evaluate(evaluation.trainer))
    trainer = train(EMA(0.5, warmup=False), EMA(0.0), evaluation, steps=2)
    latest = trainer.storage.latest()
    assert (latest["eval_EMA/w"], latest["eval_EMA_2/w"], latest["eval/w"]) == (1.5, 2.0, 2.0)
    with pytest.raises(
        ConfigError,
        match="hooks.EMA_2.evaluate=instead: expected one such hook, and hooks.EMA is one",
    ):
        train(EMA(evaluate="instead"), EMA(evaluate="instead"), EvalHook())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight  # shared
        self.norm = nn.BatchNorm1d(4)

    def forward(self, batch):
        return self.b(self.norm(self.a(batch))).square().mean()


def of_each_step(rank, num_steps=6):
    torch.manual_seed(0)
    model, ema, kept = Net(), EMA(0.9), []
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))]
    keep = CallbackHook(after_step=lambda _: kept.append(copy.deepcopy(model.state_dict())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, data, hooks=[keep, ema]).train(0, num_steps)
    return kept, ema.state_dict()


@pytest.mark.ranks
def test_all_ranks_hold_the_same_average_and_it_is_the_plain_one():
    results = run_ranks(of_each_step, 2)
    assert results[0][1]["average"].keys() == {"a.weight", "b.weight", "norm.weight", "norm.bias"}
    for name, value in results[0][1]["average"].items():
        assert torch.equal(value, results[1][1]["average"][name])
        plain = results[0][0][0][name].double()
        for t, weights in enumerate(results[0][0][1:], start=1):
            decay = min(0.9, (1 + t) / (10 + t))
            plain = decay * plain + (1 - decay) * weights[name]
        torch.testing.assert_close(value.double(), plain, rtol=1e-6, atol=1e-7)
    shared = results[0][1]["average"]
    assert torch.equal(shared["a.weight"], shared["b.weight"])


def test_a_resumed_average_goes_on_with_the_same_bits():
    straight = EMA(0.9)
    train(straight, steps=9)
    first = train(EMA(0.9), steps=4)
    state = copy.deepcopy(first.state_dict())
    assert state["hooks"]["EMA"]["updates"] == 4
    resumed = EMA(0.9)
    train(resumed, steps=9, start=4, state=state)
    assert torch.equal(resumed.state_dict()["average"]["w"], straight.state_dict()["average"]["w"])


def test_16_bit_weights_have_an_average_of_32():
    model = One().bfloat16()
    ema = EMA(0.999, warmup=False)
    train(ema, steps=3, model=model)
    value = ema.state_dict()["average"]["w"]
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(1 + 0.001 * 1 + 0.001 * (3 - 1.001))
    with ema.applied():
        assert model.w.dtype is torch.bfloat16


def test_an_update_is_one_operation_and_reads_nothing_back():
    ema = EMA(0.9)
    train(ema, steps=2, model=Net())
    with Kernels() as seen:
        ema.after_step()
    assert seen.names == ["aten::_foreach_lerp_.Scalar"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0: expected a number in \[0, 1\)"),
        ({"period": 0}, "period=0"),
        ({"evaluate": "both"}, "evaluate=both: expected one of beside, instead"),
    ],
)
def test_mistakes(keywords, message):
    with pytest.raises(ConfigError, match=message):
        EMA(**keywords)
