"""The step against plain PyTorch."""

import copy
import math
from collections import Counter

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrain import Trainer, get_event_storage
from distrain.errors import ConfigError, NonFiniteLoss
from distrain.hooks import CallbackHook, EarlyStopping, EvalHook, IterationTimer, LRScheduler
from distrain.schedule import WarmupCosineLR


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, y):
        return F.mse_loss(self.net(x), y)


def batches(num, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=g), torch.randn(size, 1, generator=g)) for _ in range(num)
    ]


def fresh(seed=0):
    torch.manual_seed(seed)
    model = Regression()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plain(data, *, steps, clip=None, schedule=None):
    model, optimizer = fresh()
    scheduler = schedule and schedule(optimizer)
    losses = []
    for i in range(steps):
        loss = model(*data[i % len(data)])
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return weights(model), losses


def test_it_equals_a_plain_loop_bit_for_bit():
    data = batches(5)
    expected, losses = plain(data, steps=40, clip=0.5)
    model, optimizer = fresh()
    trainer = Trainer(model, optimizer, data, clip_norm=0.5)
    trainer.train(0, 40)
    assert equal(weights(model), expected)
    assert [v for v, _ in trainer.storage.history("loss").values()] == losses


def test_with_schedule_and_hooks_too():
    data = batches(3)

    def schedule(optimizer):
        return WarmupCosineLR(optimizer, 30, warmup_iters=5)

    expected, _ = plain(data, steps=30, schedule=schedule)
    model, optimizer = fresh()
    trainer = Trainer(
        model, optimizer, data, hooks=[IterationTimer(), LRScheduler(schedule(optimizer))]
    )
    trainer.train(0, 30)
    assert equal(weights(model), expected)
    rates = [value for value, _ in trainer.storage.history("lr").values()]
    assert rates[0] == pytest.approx(0.1 * 0.001)
    assert rates[15] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_accumulation_is_the_mean_over_micro_batches():
    data = batches(4)
    model, optimizer = fresh()
    trainer = Trainer(model, optimizer, data, accumulation=4)
    trainer.train(0, 1)
    other, other_optimizer = fresh()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loss = other(x, y)
    loss.backward()
    other_optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert trainer.storage.latest()["loss"] == pytest.approx(loss.item())


class Varying(nn.Module):
    """Returns the losses that a batch of (name, value) names, times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, losses):
        return {name: value * self.w for name, value in losses.items()}


@pytest.mark.parametrize("turned", [False, True])
def test_accumulation_over_forwards_with_other_losses(turned):
    parts = [{"a": 1.0}, {"a": 3.0, "b": 2.0}]
    model = Varying()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, optimizer, parts[::-1] if turned else parts, accumulation=2)
    trainer.train(0, 1)
    assert trainer.storage.latest() == {"loss": 3.0, "a": 2.0, "b": 2.0}  # loss: (1 + 5) / 2
    assert model.w.item() == 1.0 - (1.0 + 5.0) / 2


def losses_of_some_forwards(rank):
    """B is in one forward of two on rank 0, in both on rank 1."""
    parts = [[{"a": 1.0}, {"a": 1.0, "b": 1.0}], [{"a": 1.0, "b": 4.0}, {"a": 1.0, "b": 10.0}]]
    model = Varying()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, optimizer, parts[rank], accumulation=2)
    trainer.train(0, 1)
    return trainer.storage.latest()["b"]


@pytest.mark.ranks
def test_each_forward_with_a_loss_counts_once_in_its_mean_over_ranks():
    assert run_ranks(losses_of_some_forwards, 2) == [(1.0 + 4.0 + 10.0) / 3] * 2


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 100.0}, {"clip_value": 100.0}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_hooks_see_unscaled_gradients(clip, accumulation):
    seen = []
    model = Named(lambda w: w * 0.25)
    look = CallbackHook(after_backward=lambda trainer: seen.append(model.w.grad.item()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(
        model,
        optimizer,
        [torch.ones(1)],
        precision="fp16",
        hooks=[look],
        accumulation=accumulation,
        **clip,
    )
    trainer.train(0, 3)
    assert trainer.scaler.get_scale() == 2.0**16
    assert seen == [0.25] * 3
    assert model.w.item() == 1 - 3 * 0.5 * 0.25


def test_hooks_see_an_overflow_and_the_update_is_left_out():
    seen = []
    model = Named(lambda w: w * 1e38)
    look = CallbackHook(after_backward=lambda trainer: seen.append(model.w.grad.item()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Trainer(model, optimizer, [torch.ones(1)], precision="fp16", hooks=[look]).train(0, 1)
    assert seen == [math.inf]
    assert model.w.item() == 1.0


def ddp_steps(rank, world_size, accumulation=1):
    data = batches(20 * accumulation, seed=rank)
    model, optimizer = fresh()
    Trainer(model, optimizer, data, accumulation=accumulation).train(0, 20)
    other, other_optimizer = fresh()
    ddp = DistributedDataParallel(other, gradient_as_bucket_view=True)
    if world_size > 2:  # the same order of additions from the first step on
        ddp(*data[0]).backward()
        other_optimizer.zero_grad()
    for batch in data[:20]:
        ddp(*batch).backward()
        other_optimizer.step()
        other_optimizer.zero_grad()
    return equal(weights(model), weights(other))


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_plain_ddp_bit_for_bit(world_size):
    assert run_ranks(ddp_steps, world_size, world_size) == [True] * world_size


class Named(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, batch):
        get_event_storage().put_scalar("seen", batch.sum())
        return self.answer(self.w)


def test_named_losses_are_summed_and_put():
    model = Named(lambda w: {"loss_a": w * 2, "loss_b": (w * 3).reshape(1)})
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), [torch.ones(3)])
    trainer.train(0, 2)
    latest = trainer.storage.latest()
    assert latest == {"loss": 5.0, "loss_a": 2.0, "loss_b": 3.0, "seen": 3.0}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w: w.expand(3), r"returned a tensor of shape \[3\], not a loss"),
        (lambda w: None, "returned NoneType"),
        (lambda w: {"loss": w, "logits": w.expand(4)}, r"'logits': a tensor of shape \[4\]"),
        (lambda w: {"loss": w, "loss_a": w}, "'loss' among"),
        (lambda w: {}, "returned dict"),
    ],
)
def test_a_model_without_loss_is_told_what_came(answer, message):
    model = Named(answer)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(3)])
    with pytest.raises(ConfigError, match=message):
        trainer.train(0, 1)


def test_dict_batches_are_keywords():
    model, optimizer = fresh()
    x, y = batches(1)[0]
    Trainer(model, optimizer, [{"y": y, "x": x}]).train(0, 3)


def test_data_without_batches():
    model, optimizer = fresh()
    with pytest.raises(ConfigError, match="no batch"):
        Trainer(model, optimizer, []).train(0, 3)


def test_a_loss_that_is_not_finite_stops():
    model = Named(lambda w: w / 0 if get_event_storage().iter >= 8 else w)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(1)], window=5)
    with pytest.raises(NonFiniteLoss, match="loss not finite from iteration 8 on"):
        trainer.train(0, 1_000_000)  # a second of them
    assert trainer.iter_done < 1_000_000


def test_skip_leaves_the_update_out():
    bad = {3, 4}
    model = Named(lambda w: w * math.nan if get_event_storage().iter in bad else w * 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, [torch.ones(1)], nonfinite="skip")
    trainer.train(0, 6)
    assert model.w.item() == pytest.approx(1.0 - 4 * 0.1)
    skipped = trainer.storage.history("skipped_update").values()
    assert [i for value, i in skipped if value] == [3, 4]


def test_bf16_runs_forward_under_autocast():
    kinds = []
    model = Named(lambda w: (kinds.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype), w)[1])
    Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(1)], precision="bf16"
    ).train(0, 1)
    assert kinds == [torch.bfloat16]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"precision": "fp8"}, "trainer.precision='fp8'; choose"),
        ({"nonfinite": "ignore"}, "trainer.nonfinite='ignore'"),
        ({"accumulation": 0}, "trainer.accumulation=0"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "keep one"),
    ],
)
def test_keywords_are_checked(keywords, message):
    model, optimizer = fresh()
    with pytest.raises(ConfigError, match=message):
        Trainer(model, optimizer, batches(1), **keywords)


def leaves_no_trace(rank):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            get_event_storage().put_scalar("inside", 1.0)
            return F.mse_loss(self.net(x), y)

    model = Model()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(4))
    state = torch.get_rng_state()
    trainer.prepare()
    first = next(trainer._batches)
    return (
        equal(before, model.state_dict())
        and torch.equal(state, torch.get_rng_state())
        and torch.equal(first[0], batches(4)[0][0])
        and all(p.grad is None for p in model.parameters())
    )


@pytest.mark.ranks
def test_settling_the_buckets_leaves_no_trace():
    assert run_ranks(leaves_no_trace, 3) == [True] * 3


def test_evaluation_and_early_stopping():
    calls: Counter = Counter()

    def evaluate():
        calls["num"] += 1
        return {"score": [1.0, 3.0, 2.0, 2.5, 2.9, 9.0][calls["num"] - 1]}

    model, optimizer = fresh()
    trainer = Trainer(
        model,
        optimizer,
        batches(2),
        hooks=[
            EvalHook(10, function=evaluate),
            EarlyStopping("eval/score", patience=3),
        ],
        window=10,
    )
    trainer.train(0, 1000)
    scores = trainer.storage.history("eval/score").values()
    # best at iteration 19; 29, 39 and 49 are no better, and then all agree within a window
    assert scores[:5] == [(1.0, 9), (3.0, 19), (2.0, 29), (2.5, 39), (2.9, 49)]
    assert 50 <= trainer.iter_done <= 62


def test_the_last_iteration_is_evaluated_once():
    seen = []
    model, optimizer = fresh()
    hook = EvalHook(5, function=lambda: {"n": float(seen.append(0) or len(seen))})
    at_end = []
    trainer = Trainer(
        model,
        optimizer,
        batches(2),
        hooks=[hook, CallbackHook(after_train=lambda t: at_end.append(t.iter_done))],
    )
    trainer.train(0, 10)
    assert len(seen) == 2
    assert at_end == [10]
