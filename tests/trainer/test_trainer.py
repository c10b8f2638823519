"""The step against plain PyTorch."""

import copy
import math
import random
from collections import Counter

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distrain import HookBase, Loss, Step, Trainer, get_event_storage
from distrain.distributed import DDP
from distrain.errors import ConfigError, NonFiniteLoss
from distrain.hooks import CallbackHook, EarlyStopping, EvalHook, IterationTimer, LRScheduler
from distrain.schedule.schedules import WarmupCosineLR


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
        (lambda w: w.expand(3), r"returned a tensor of shape \[3\]: expected a loss"),
        (lambda w: None, "returned NoneType"),
        (lambda w: {"loss": w, "logits": w.expand(4)}, r"'logits': a tensor of shape \[4\]"),
        (lambda w: {"loss": w, "loss_a": w}, "'loss' among"),
        (lambda w: {}, "returned dict"),
        (lambda w: {0: w, 1: w}, "returned 0 as a name: expected text, as '0'"),
        (lambda w: {1: Loss(w, 1)}, "returned 1 as a name: expected text, as '1'"),
    ],
)
def test_a_model_without_loss_is_told_what_came(answer, message):
    model = Named(answer)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(3)])
    with pytest.raises(ConfigError, match=message):
        trainer.train(0, 1)


def test_an_optimizer_that_needs_a_closure_is_refused():
    model = Named(lambda w: w)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigError, match="optim: LBFGS calls the model several times: expected"):
        Trainer(model, optimizer, [torch.ones(3)])


class ClosureStep(Step):
    def __call__(self, batch):
        optimizer = self.trainer.optimizer

        def closure():
            optimizer.zero_grad()
            loss = self.model(batch)
            loss.backward()
            return loss

        optimizer.step(closure)


def test_a_step_may_call_an_optimizer_with_a_closure():
    model = Named(lambda w: (w - 3) ** 2)
    optimizer = torch.optim.LBFGS(model.parameters())
    Trainer(model, optimizer, [torch.ones(3)], step=ClosureStep()).train(0, 3)
    assert abs(model.w.item() - 3) < 1e-3


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=True)

    def forward(self, rows):
        return self.table(rows).sum()


@pytest.mark.parametrize(
    "setting", [{"clip_norm": 1.0}, {"clip_value": 1.0}, {"nonfinite": "skip"}]
)
def test_what_needs_dense_gradients_says_so(setting):
    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, [torch.tensor([0, 2])], **setting)
    with pytest.raises(ConfigError, match=rf"trainer.{[*setting][0]}.*: expected dense gradients"):
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
        ({"precision": "fp8"}, "trainer.precision=fp8: expected one of"),
        ({"nonfinite": "ignore"}, "trainer.nonfinite=ignore"),
        ({"accumulation": 0}, "trainer.accumulation=0"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "keep one"),
    ],
)
def test_keywords_are_checked(keywords, message):
    model, optimizer = fresh()
    with pytest.raises(ConfigError, match=message):
        Trainer(model, optimizer, batches(1), **keywords)


CALLS = []  # of Watched.forward


class Watched(nn.Module):
    """Counts its calls wherever a model may, and has buffers and random draws."""

    total = 0

    def __init__(self, parts=1):
        super().__init__()
        width = 300_000 // parts  # with several parts the gradients fill several buckets
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
        self.wide = nn.ParameterList([torch.randn(width) * 1e-3 for _ in range(parts)])
        self.num = 0
        self.nested = {"num": [0]}
        seen = self.seen = []
        self.net.register_forward_hook(lambda *_: seen.append(0))

    def forward(self, x, y):
        CALLS.append(0)
        Watched.total += 1
        self.num += 1
        self.nested["num"][0] += 1
        get_event_storage().put_scalar("inside", 1.0)
        return F.mse_loss(self.net(x), y) + y.mean() * sum(p.square().sum() for p in self.wide)

    def counts(self):
        return (len(CALLS), Watched.total, self.num, self.nested["num"][0], len(self.seen))


class Ready:
    """The state of everything before the first step."""

    def __init__(self, trainer, model):
        self.model = model
        self.before = copy.deepcopy(model.state_dict())
        trainer.max_iter = 1
        torch_state, python = torch.get_rng_state(), random.getstate()
        trainer.prepare()
        self.same_random = torch.equal(torch_state, torch.get_rng_state()) and (
            python == random.getstate()
        )


def leaves_no_trace(rank, ddp):
    torch.manual_seed(0)
    CALLS.clear()
    model = Watched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, batches(4), strategy=DDP(ddp))
    ready = Ready(trainer, model)
    first = next(trainer._batches)
    assert ready.same_random
    assert equal(ready.before, model.state_dict())
    assert trainer.module is trainer.model.module is model
    assert torch.equal(first[0], batches(4)[0][0])
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    return model.counts()


@pytest.mark.ranks
def test_settling_the_buckets_leaves_no_trace():
    assert run_ranks(leaves_no_trace, 3, {}) == [(0, 0, 0, 0, 0)] * 3


@pytest.mark.ranks
def test_settling_the_buckets_of_a_static_graph_leaves_no_trace_in_the_model():
    counts = run_ranks(leaves_no_trace, 3, {"static_graph": True})
    assert [(num, nested) for _, _, num, nested, _ in counts] == [(0, 0)] * 3


class Mixed(nn.Module):
    """Parameters of every kind that DDP takes: sparse, shared, frozen, complex."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.bag = nn.EmbeddingBag(5, 3, sparse=True)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)
        self.tied = self.head
        self.spectrum = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def forward(self, x):
        h = self.frozen(self.table(x) + self.bag(x[:, None]))
        return self.tied(h).mean() + self.spectrum.abs().sum() * 0.1


def buckets_after_steps(rank, kind, ddp):
    """Return whether DDP has its final buckets after each step, their sizes, and the calls."""
    torch.manual_seed(0)
    model = Watched(parts=5) if kind == "watched" else Mixed()
    data = batches(4, seed=rank) if kind == "watched" else [torch.tensor([1, 2, 3])]
    rebuilt = []

    def look(trainer):
        rebuilt.append(trainer.model._has_rebuilt_buckets)

    options = {"bucket_cap_mb": 0.3} | ddp
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = [CallbackHook(after_step=look)]
    trainer = Trainer(model, optimizer, data, hooks=hooks, strategy=DDP(options))
    trainer.train(0, 3)
    sizes = trainer.model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    return rebuilt, sizes.split(","), model.num if kind == "watched" else 3


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "ddp"),
    [
        ("watched", {}),
        ("mixed", {}),
        ("watched", {"static_graph": True}),
    ],
)
def test_buckets_are_final_from_the_first_step_on_and_the_model_sees_its_steps_only(kind, ddp):
    for rebuilt, sizes, num in run_ranks(buckets_after_steps, 3, kind, ddp):
        assert num == 3
        assert rebuilt == [True] * 3
        assert len(sizes) >= 3


def straight_and_resumed(rank, ddp):
    """Return whether six steps end with the bits of three steps and three by another trainer."""

    def fresh_trainer():
        torch.manual_seed(rank)
        model = Watched(parts=5)
        model.net[2].p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        strategy = DDP({"bucket_cap_mb": 0.3} | ddp)
        return Trainer(model, optimizer, batches(6, seed=rank), strategy=strategy)

    straight, first, second = fresh_trainer(), fresh_trainer(), fresh_trainer()
    straight.train(0, 6)
    first.train(0, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.train(3, 6)
    return equal(weights(straight.module), weights(second.module))


@pytest.mark.ranks
@pytest.mark.parametrize("ddp", [{}, {"static_graph": True}], ids=str)
def test_a_resumed_run_on_three_ranks_has_the_bits_of_a_straight_one(ddp):
    assert run_ranks(straight_and_resumed, 3, ddp) == [True] * 3


class Halves(nn.Module):
    """Its second layer has no part in the loss."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x, y):
        return self.a(self.frozen(x)).mean()


def unused(rank, ddp):
    model = Halves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, batches(2), strategy=DDP(ddp)).train(0, 3)


@pytest.mark.ranks
def test_unused_parameters_are_named():
    with pytest.raises(
        ConfigError,
        match=r"on rank [01] \(b.weight, b.bias\).*"
        "trainer.ddp.find_unused_parameters=true",
    ) as caught:
        run_ranks(unused, 2, {})
    assert "\n" not in str(caught.value)
    run_ranks(unused, 2, {"find_unused_parameters": True})


class Unfreeze(HookBase):
    def __init__(self, at, group=False):
        self.at, self.group = at, group

    def before_step(self):
        if self.trainer.iter == self.at:
            layer = self.trainer.module.frozen.requires_grad_(True)
            if self.group:
                self.trainer.optimizer.add_param_group({"params": [*layer.parameters()]})


def unfrozen(rank, at, group=False, everything=False):
    torch.manual_seed(0)
    model = Halves()
    model.b.requires_grad_(False)
    some = [p for p in model.parameters() if everything or p.requires_grad]
    optimizer = torch.optim.SGD(some, lr=0.1)
    trainer = Trainer(model, optimizer, batches(2), hooks=[Unfreeze(at, group)], window=5)
    trainer.train(0, 12)


@pytest.mark.parametrize("at", [0, 3, 11])
def test_a_parameter_that_is_unfrozen_but_not_trained_is_named(at):
    message = r"in no group of the optimizer \(frozen.weight, frozen.bias\).*from the start"
    with pytest.raises(ConfigError, match=message):
        unfrozen(0, at)


def test_a_parameter_that_is_unfrozen_and_in_a_group_is_trained():
    unfrozen(0, 3, group=True)
    unfrozen(0, 3, everything=True)


@pytest.mark.ranks
@pytest.mark.parametrize("keywords", [{"group": True}, {"everything": True}], ids=str)
def test_a_parameter_that_is_unfrozen_but_not_combined_over_ranks_is_named(keywords):
    with pytest.raises(ConfigError, match=r"DDP does not reduce over ranks \(frozen.weight"):
        run_ranks(unfrozen, 2, 3, **keywords)


def thawed_by_its_gradient(rank):
    """The advice of the message: frozen by a gradient of None until iteration 3."""
    torch.manual_seed(0)
    model = Halves()
    model.frozen.requires_grad_(True)
    model.b.requires_grad_(False)
    seen = []

    def freeze(trainer):
        seen.append(model.frozen.weight.detach().clone())
        if trainer.iter < 3:
            for p in model.frozen.parameters():
                p.grad = None

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data = batches(2, seed=rank)
    Trainer(model, optimizer, data, hooks=[CallbackHook(after_backward=freeze)]).train(0, 5)
    return [torch.equal(seen[0], w) for w in seen], seen[-1]


@pytest.mark.ranks
def test_a_parameter_is_frozen_by_a_gradient_of_none():
    (same, weight), (_, other) = run_ranks(thawed_by_its_gradient, 2)
    assert same == [True] * 4 + [False]
    assert torch.equal(weight, other)


def test_a_static_graph_does_not_go_with_accumulation():
    model, optimizer = fresh()
    message = "trainer.ddp.static_graph=true: expected trainer.accumulation=1, not 2"
    with pytest.raises(ConfigError, match=message):
        strategy = DDP({"static_graph": True})
        Trainer(model, optimizer, batches(1), accumulation=2, strategy=strategy)


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
