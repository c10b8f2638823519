"""Losses with weights against one big batch in plain PyTorch."""

import math

import pytest
import torch
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distrain
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.errors import ConfigError, NonFiniteLoss
from distrain.trainer.evaluate import evaluate

V = 7
NUM = 24  # samples of 0 to 9 tokens


def samples():
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randint(0, V, (NUM, 10), generator=g) for _ in range(2))
    for i in range(NUM):
        y[i, (5 * i) % 10 :] = -100
    return x, y


class LM(nn.Module):
    """Token losses: one, two by name with other weights, or one beside a plain loss."""

    def __init__(self, kind="one"):
        super().__init__()
        self.kind = kind
        g = torch.Generator().manual_seed(1)
        self.e = nn.Embedding(V, V)
        nn.init.normal_(self.e.weight, generator=g)
        self.out = nn.Linear(V, V)
        nn.init.normal_(self.out.weight, generator=g)
        nn.init.zeros_(self.out.bias)

    def parts(self, x, y):
        logits = self.out(self.e(x).tanh())  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        is_token = y != -100
        odd = is_token & (x % 2 == 1)
        tokens = distrain.Loss(losses.sum(), is_token.sum())
        return tokens, distrain.Loss((losses * odd).sum(), odd.sum().item()), logits.square().mean()

    def forward(self, x, y):
        tokens, odd, plain = self.parts(x, y)
        if self.kind == "one":
            return tokens
        if self.kind == "named":
            return {"tokens": tokens, "odd": odd, "plain": 0.1 * plain}
        return {"tokens": tokens, "odd": odd}

    def metrics(self, x, y):
        tokens, odd, _ = self.parts(x, y)
        return {"tokens": tokens, "odd": odd, "length": (y != -100).sum(1).float()}


def big_batch(kind, clip=None):
    """Return the update and the losses of one step over all samples in plain PyTorch."""
    model = LM(kind)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    tokens, odd, plain = model.parts(*samples())
    means = {"tokens": tokens.total / tokens.weight, "odd": odd.total / odd.weight}
    if kind == "one":
        means = {"loss": means["tokens"]}
    elif kind == "named":
        means["plain"] = 0.1 * plain
    loss = sum(means.values())
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    update = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    return update, {name: value.item() for name, value in ({"loss": loss} | means).items()}


def our_step(rank, world_size, kind, accumulation, **settings):
    x, y = samples()
    n = NUM // world_size // accumulation
    data = [(x[i : i + n], y[i : i + n]) for i in range(rank * n * accumulation, NUM, n)]
    model = LM(kind)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = distrain.Trainer(model, optimizer, data, accumulation=accumulation, **settings)
    trainer.train(0, 1)
    weights = trainer.state_dict()["model"]
    after = [weights[name] for name, _ in model.named_parameters()]
    if any(part is None for part in after):  # FSDP: whole on rank 0
        return None
    update = nn.utils.parameters_to_vector(after).detach() - before
    return update, {n: h.latest() for n, h in trainer.storage.histories().items()}


def all_kinds(rank, world_size, strategy="ddp", **settings):
    return {
        (kind, accumulation): our_step(
            rank, world_size, kind, accumulation, strategy=strategy, **settings
        )
        for kind in ("one", "two", "named")
        for accumulation in (1, 2, 4)
    }


@pytest.mark.parametrize(
    ("world_size", "strategy", "clip"),
    [(1, "ddp", None), (2, "ddp", 0.01), (3, "ddp", None), (2, "fsdp", 0.01)],
)
def test_each_token_counts_alike_however_the_batch_is_spread(world_size, strategy, clip):
    results = run_ranks(all_kinds, world_size, world_size, strategy, clip_norm=clip)
    for (kind, accumulation), (update, shown) in results[0].items():
        expected, losses = big_batch(kind, clip)
        torch.testing.assert_close(
            update, expected, rtol=1e-4, atol=1e-7, msg=f"{kind}, {accumulation} forwards"
        )
        for name, value in losses.items():
            assert shown[name] == pytest.approx(value, rel=1e-5), (kind, accumulation, name)
        assert shown["skipped_update"] == 0.0


class Normed(nn.Module):
    """A weighted loss behind a norm over the batches of all ranks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        g = torch.Generator().manual_seed(1)
        for p in self.parameters():
            nn.init.normal_(p, generator=g)

    def forward(self, x, weights):
        losses = self.layers(x)[:, 0].square()
        return distrain.Loss((losses * weights).sum(), weights.sum())


class EachForward(distrain.Step):
    accumulates = True

    def __call__(self, batch):
        with self.update() as update:
            for x, weights in batch:
                update.backward(self.model(x, weights))


@pytest.mark.parametrize("step", [None, EachForward()])
def test_gradients_from_other_ranks_are_scaled_alike_before_the_weights_are_known(step):
    g = torch.Generator().manual_seed(3)
    x, weights = torch.randn(2, 2, 2, 3, generator=g), torch.tensor([1.0, 5.0, 2.0, 9.0])
    weights = weights.view(2, 2, 1).expand(2, 2, 2)  # per rank, forward and sample

    def stepped(rank):
        model = convert_sync_batchnorm(Normed())
        data = [*zip(x[rank], weights[rank], strict=True)]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = distrain.Trainer(model, optimizer, data, accumulation=2, step=step)
        trainer.train(0, 1)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    model = Normed()
    forwards = [model(x[:, i].flatten(0, 1), weights[:, i].flatten()) for i in range(2)]
    (sum(loss.total for loss in forwards) / weights.sum()).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    for after in run_ranks(stepped, 2):
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


class Scaled(nn.Module):
    """A total and a weight from the batch; the gradient of the total is the batch's first value."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, total, weight):
        return distrain.Loss(total * self.w, weight)


def updates(rank, data, **settings):
    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    seen = []
    hook = distrain.hooks.CallbackHook(after_step=lambda t: seen.append(model.w.item()))
    batches = [tuple(map(torch.tensor, batch)) for batch in data[rank]]
    trainer = distrain.Trainer(model, optimizer, batches, hooks=[hook], window=1, **settings)
    trainer.train(0, len(batches) // trainer.accumulation)
    skipped = [v for v, _ in trainer.storage.history("skipped_update").values()]
    losses = trainer.storage.history("loss").values()
    return seen, skipped, losses, optimizer.state[model.w]["step"].item()


def test_an_update_without_elements_is_skipped_on_all_ranks_and_reported(caplog):
    # iteration 1: no elements on any rank; iteration 2: on rank 0 only
    data = [[(4.0, 2.0), (0.0, 0.0), (6.0, 3.0)], [(2.0, 1.0), (0.0, 0.0), (0.0, 0.0)]]
    for seen, skipped, losses, steps in run_ranks(updates, 2, data):
        assert seen[0] == seen[1] != seen[2]
        assert skipped == [0.0, 1.0, 0.0]
        first, last = losses  # nothing is shown of an iteration without elements
        assert first == (2.0, 0)
        assert last == (pytest.approx(2.0 * seen[1]), 2)
        assert steps == 2
    updates(0, data)
    assert "weights of all losses are 0 on all ranks at iteration 1: this update" in caplog.text


@pytest.mark.parametrize("bad", [(math.inf, 2.0), (2.0, math.nan)])  # total or weight
def test_a_loss_that_is_not_finite_stops_or_is_skipped(bad):
    data = [[(1.0, 1.0), (2.0, 1.0), bad, (1.0, 1.0)]]
    with pytest.raises(NonFiniteLoss, match="loss not finite from iteration 1 on, on rank 0"):
        updates(0, data, accumulation=2)
    seen, skipped, _, _ = updates(0, data, accumulation=2, nonfinite="skip")
    assert seen[0] == seen[1]
    assert skipped == [0.0, 1.0]


def test_a_weight_that_is_nan_on_one_rank_stops_all():
    data = [[(1.0, 1.0), (1.0, 1.0)], [(1.0, 1.0), (1.0, math.nan)]]
    with pytest.raises(NonFiniteLoss, match="loss not finite from iteration 1 on, on rank 1 of 2"):
        run_ranks(updates, 2, data)


def test_fp16_does_not_overflow_by_large_sums():
    data = [[(60_000.0, 60_000.0)] * 4]
    seen, *_ = updates(0, data, accumulation=4, precision="fp16")
    assert seen[0] < 1.0


class ReadBacks(TorchDispatchMode):
    def __init__(self):
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_on_the_way_to_the_update():
    model, x = Scaled(), (torch.tensor(4.0), torch.tensor(2.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = distrain.Trainer(model, optimizer, [x] * 4, accumulation=2, window=1000)
    with ReadBacks() as found:
        trainer.train(0, 10)
    assert found.num <= 1  # at the end of the window


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_is_weighted_likewise(world_size):
    def evaluated(rank):
        x, y = samples()
        model = LM("two")
        part = [(x[i : i + 5], y[i : i + 5]) for i in range(0, NUM, 5)][rank::world_size]
        metrics = evaluate(model, part, device=torch.device("cpu"))
        del LM.metrics
        return metrics, evaluate(model, part, device=torch.device("cpu"))

    _, losses = big_batch("two")
    for metrics, means in run_ranks(evaluated, world_size):
        assert metrics["tokens"] == pytest.approx(losses["tokens"], rel=1e-6)
        assert metrics["odd"] == pytest.approx(losses["odd"], rel=1e-6)
        assert metrics["length"] == (samples()[1] != -100).sum().item() / NUM
        assert means == pytest.approx(losses, rel=1e-6)


class Weighing(nn.Module):
    """A model of test_resume's images, where the weight of a batch varies."""

    def __init__(self, **_):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x, y, index, drawn):
        weights = 1.0 + index % 3
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        return {"a": distrain.Loss((weights * losses).sum(), weights.sum()), "b": losses.mean()}


def test_resumed_is_straight_bit_for_bit(tmp_path):
    model = {"_target_": f"{__name__}.Weighing"}
    both = run_ranks(
        interrupted_and_straight,
        2,
        tmp_path,
        model=model,
        workers=2,
        accumulation=2,
        sync_batchnorm=False,
        ddp={"broadcast_buffers": False},
    )
    broken, whole = both[0]
    assert "a" in whole["histories"]
    assert not differing(broken, whole)


class Turning(nn.Module):
    """Returns the losses that `answers` lists, one after the other."""

    def __init__(self, *answers):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.answers = iter(answers)

    def forward(self, x):
        return next(self.answers)(self.w)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [lambda w: w, lambda w: distrain.Loss(w, 1)],
            "a distrain.Loss among loss: expected one in each forward, or in none",
        ),
        (
            [lambda w: {"a": distrain.Loss(w, 1)}, lambda w: {"b": distrain.Loss(w, 1)}],
            "b: Loss with a new name: expected those of the first step",
        ),
        ([lambda w: distrain.Loss(w, -1)], "loss: Loss.weight=-1: expected a finite number >= 0"),
        (
            [lambda w: distrain.Loss(w, torch.tensor(-1))],  # not read back before the update
            r"loss: Loss.weight=-1.0: expected at least 0, summed over all ranks",
        ),
        ([lambda w: distrain.Loss(2.0, 1)], "loss: Loss.total=float: expected a tensor with one"),
        (
            [lambda w: distrain.Loss(w, torch.ones(2))],
            r"loss: Loss.weight=shape \[2\]: expected one element; sum it",
        ),
    ],
)
def test_bad_losses(answers, message):
    model = Turning(*answers)
    trainer = distrain.Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(1)] * 2
    )
    with pytest.raises(ConfigError, match=message):
        trainer.train(0, 2)
