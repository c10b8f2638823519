"""Steps of the user's own, against plain PyTorch loops; the examples are among them."""

import copy

import pytest
import torch
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from torch import nn
from torch.nn import functional as F

import distrain
from distrain.distributed import DDP
from distrain.errors import ConfigError, NonFiniteLoss
from distrain.hooks import CallbackHook, LRScheduler
from distrain.schedule import WarmupCosineLR
from examples.clip import CLIP
from examples.distillation import Distilled
from examples.sam import SAM
from examples.wgan_gp import WGANStep


def gan(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)),
            "critic": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        }
    )


def adams(model):
    return {
        name: torch.optim.Adam(part.parameters(), lr=0.01 * (n + 1), betas=(0.0, 0.9))
        for n, (name, part) in enumerate(model.items())
    }


def cosines(optimizers):
    return {name: WarmupCosineLR(o, 12, warmup_iters=2) for name, o in optimizers.items()}


def real_batches(num=6, size=8):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 4, generator=g),) for _ in range(num)]


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def plain_wgan(data, steps, clip=None):
    model = gan()
    optimizers, generator, critic = adams(model), model["generator"], model["critic"]
    schedules = cosines(optimizers)
    torch.manual_seed(3)
    for i in range(steps):
        real = data[i % len(data)][0]
        noise = torch.randn(len(real), 2)
        fake = generator(noise).detach()
        mixed = torch.lerp(fake, real, torch.rand(len(real), 1)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        excess = (slope.norm(dim=1) - 1).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + 10.0 * excess
        optimizers["critic"].zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(critic.parameters(), clip)
        optimizers["critic"].step()
        if i % 2 == 0:
            optimizers["generator"].zero_grad()
            (-critic(generator(noise)).mean()).backward()
            if clip:
                nn.utils.clip_grad_norm_(generator.parameters(), clip)
            optimizers["generator"].step()
        for schedule in schedules.values():
            schedule.step()
    return vector(model)


def test_wgan_equals_a_plain_loop_bit_for_bit():
    data, model, seen = real_batches(), gan(), []
    optimizers = adams(model)
    hooks = [
        LRScheduler(cosines(optimizers)),
        CallbackHook(after_backward=lambda t: seen.append(t.update_name)),
    ]
    trainer = distrain.Trainer(
        model, optimizers, data, hooks=hooks, clip_norm=0.5, step=WGANStep(noise=2, every=2)
    )
    torch.manual_seed(3)
    trainer.train(0, 9)
    assert torch.equal(vector(model), plain_wgan(data, 9, clip=0.5))
    latest = trainer.storage.latest()
    parts = latest["critic/distance"] + latest["critic/penalty"]
    assert latest["critic/loss"] == pytest.approx(parts, rel=1e-5)
    assert latest["generator/lr"] == pytest.approx(latest["critic/lr"] / 2)
    assert latest["generator/grad_norm"] > 0
    assert seen[:3] == ["critic", "generator", "critic"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


NAMED = {
    "model": {
        "generator": {
            "_target_": "torch.nn.Linear",
            "in_features": 2,
            "out_features": 36,
        },
        "critic": {"_target_": f"{__name__}.Critic"},
    },
    "optim": {
        "generator": {"target": "torch.optim.Adam", "lr": 0.01},
        "critic": {"target": "torch.optim.AdamW", "lr": 0.02, "weight_decay": 0.1},
    },
    "schedule": {
        "critic": {"_target_": "distrain.schedule.WarmupCosineLR", "max_iters": 12},
    },
    "step": {"_target_": f"{__name__}.ImageGAN", "noise": 2, "every": 2},
}


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))

    def forward(self, x):
        return self.net(x.flatten(1))


class ImageGAN(WGANStep):
    """The example on the images of the resume tests, with a count of its own."""

    num = 0

    def __call__(self, batch):
        from resume_cases import SEEN

        images, _, index, drawn = batch
        SEEN.extend(zip(index.tolist(), drawn.tolist(), strict=True))
        super().__call__([images.flatten(1)])
        self.num += 1
        distrain.get_event_storage().put_scalar("num", self.num)

    def state_dict(self):
        return {"num": self.num}

    def load_state_dict(self, state):
        self.num = state["num"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_resumed_is_straight_bit_for_bit(tmp_path, world_size):
    both = run_ranks(
        interrupted_and_straight, world_size, tmp_path, workers=2, sync_batchnorm=False, **NAMED
    )
    broken, whole = both[0]
    assert (
        whole["optimizer"].keys() == whole["schedule"]["schedule"].keys() == NAMED["optim"].keys()
    )
    assert whole["step"] == {"num": 12}
    assert not differing(broken, whole)


class Regression(nn.Module):
    """Its spare part never has a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.spare = nn.Linear(1, 1)

    def forward(self, x, y):
        return F.mse_loss(self.net(x), y)


class Default(distrain.Step):
    accumulates = True

    def __call__(self, batch):
        with self.update() as update:
            for part in batch:
                update.backward(self.model(*part))


def pairs(num, size=4):
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 4, generator=g), torch.randn(size, 1, generator=g)) for _ in range(num)
    ]


def stepped(rank, world_size, step, accumulation=1, steps=3, **settings):
    data = pairs(24)
    num = 4 // world_size // accumulation  # 4 batches per step over all
    parts = [
        tuple(torch.cat(each) for each in zip(*data[i : i + num], strict=True))
        for s in range(steps)
        for i in range(
            4 * s + rank * num * accumulation, 4 * s + (rank + 1) * num * accumulation, num
        )
    ]
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = distrain.Trainer(
        model, optimizer, parts, step=step and step(), accumulation=accumulation, **settings
    )
    trainer.train(0, steps)
    losses = [v for v, _ in trainer.storage.history("loss").values()]
    if trainer.is_sharded:
        whole = trainer.state_dict()["model"]  # on rank 0
        if rank > 0:
            return None, losses, None
        return nn.utils.parameters_to_vector(whole.values()), losses, None
    return vector(model), losses, [*optimizer.state_dict()["state"]]


def plain_sam(steps=3, rho=0.05, dtype=None):
    data, model = pairs(24), Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for s in range(steps):
        x, y = (torch.cat(each) for each in zip(*data[4 * s : 4 * s + 4], strict=True))

        def loss(x=x, y=y):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                return model(x, y)

        loss().backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        climbs = [
            p.grad * (rho / nn.utils.get_total_norm([p.grad for p in trained])) for p in trained
        ]
        with torch.no_grad():
            for p, climb in zip(trained, climbs, strict=True):
                p.add_(climb)
        optimizer.zero_grad()
        there = loss()
        there.backward()
        with torch.no_grad():
            for p, climb in zip(trained, climbs, strict=True):
                p.sub_(climb)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(there.item())
    return vector(model), losses


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 2), (2, 2), (4, 1)])
def test_sam_equals_a_plain_loop_over_the_whole_batch(world_size, accumulation):
    expected, losses = plain_sam()
    for weights, shown, _ in run_ranks(stepped, world_size, world_size, SAM, accumulation):
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        assert shown == pytest.approx(losses, rel=1e-4)


def test_autocast_forgets_weights_that_the_step_changes():
    expected, losses = plain_sam(dtype=torch.bfloat16)
    weights, shown, _ = stepped(0, 1, SAM, precision="bf16")
    assert torch.equal(weights, expected)
    assert shown == losses


def test_a_step_that_does_as_the_default_has_its_bits():
    for ours, default in zip(
        run_ranks(stepped, 2, 2, Default, 2),
        run_ranks(stepped, 2, 2, None, 2, strategy=DDP({"find_unused_parameters": True})),
        strict=True,
    ):
        assert torch.equal(ours[0], default[0])
        assert ours[1] == default[1]
        assert ours[2] == default[2], "the optimizer has no state of the spare part"


class Weighed(distrain.Step):
    """The default step, with losses of two weights."""

    accumulates = True

    def __call__(self, batch):
        with self.update() as update:
            for part in batch:
                loss = self.model(*part)
                num = len(part[0])
                update.backward({"a": distrain.Loss(loss * num, num), "b": distrain.Loss(loss, 1)})


@pytest.mark.parametrize("step", [Default, Weighed, SAM])
def test_a_sharded_model_takes_the_same_steps(step):
    torch.distributed.fsdp.fully_shard  # noqa: B018 - imported once, not in each rank
    settings = {"accumulation": 2, "clip_norm": 0.5}
    copies = run_ranks(stepped, 2, 2, step, **settings)
    shards = run_ranks(stepped, 2, 2, step, strategy="fsdp", **settings)
    torch.testing.assert_close(shards[0][0], copies[0][0], rtol=1e-5, atol=1e-6)
    assert shards[0][1] == pytest.approx(copies[0][1], rel=1e-5)


class Halves(distrain.Step):
    """A gradient that only some ranks have, and losses with weights."""

    def __call__(self, batch):
        rank = self.trainer.where.rank
        with self.update() as update:
            loss = self.model(*batch)
            if rank == 0:
                loss = loss + self.model.spare.weight.sum()
            update.backward(distrain.Loss(loss * (rank + 1), rank + 1))


def halves(rank):
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    x, y = pairs(2)[rank]
    distrain.Trainer(model, optimizer, [(x, y)], step=Halves()).train(0, 1)
    return {n: (p - before.get_parameter(n)).detach() for n, p in model.named_parameters()}


def test_weights_and_gradients_that_some_ranks_lack():
    model = Regression()
    loss = sum(model(*batch) * (rank + 1) for rank, batch in enumerate(pairs(2)))
    ((loss + model.spare.weight.sum()) / 3).backward()
    for update in run_ranks(halves, 2):
        for name, parameter in model.named_parameters():
            expected = torch.zeros(1) if parameter.grad is None else -parameter.grad
            torch.testing.assert_close(
                update[name], expected.expand_as(parameter), atol=1e-6, rtol=1e-4
            )


class Faulty(distrain.Step):
    """The critic's loss is not finite in iteration 1, on the last rank alone."""

    def __call__(self, batch):
        is_bad = self.iter == 1 and self.trainer.where.rank == self.trainer.where.world_size - 1
        with self.update("critic") as update:
            loss = 0.1 * self.model["critic"](batch[0]).float().mean()
            update.backward(loss * torch.inf if is_bad else loss)
        with self.update("generator") as update:
            update.backward(self.model["generator"](batch[0][:, :2]).float().square().mean())


def skipping(rank, **settings):
    model, seen = gan(), []
    hook = CallbackHook(after_step=lambda t: seen.append([vector(part) for part in model.values()]))
    trainer = distrain.Trainer(
        model, adams(model), real_batches(3), hooks=[hook], step=Faulty(), window=3, **settings
    )
    trainer.train(0, 3)
    names = ("critic/skipped_update", "generator/skipped_update")
    return seen, [[v for v, _ in trainer.storage.history(name).values()] for name in names]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_each_optimizer_skips_its_own_updates_on_all_ranks(precision):
    for seen, skipped in run_ranks(skipping, 2, nonfinite="skip", precision=precision):
        assert skipped == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
        (g0, c0), (g1, c1), (g2, c2) = seen
        assert torch.equal(c0, c1)
        assert not torch.equal(c1, c2)
        assert not torch.equal(g0, g1)
        assert not torch.equal(g1, g2)


class TwoUpdates(distrain.Step):
    def __call__(self, batch):
        for bad in (self.iter == 1, False):
            with self.update() as update:
                update.backward(self.model(batch).sum() * (float("nan") if bad else 1.0))


def test_the_first_of_two_updates_that_is_skipped_shows():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.ones(2, 1)]
    trainer = distrain.Trainer(model, optimizer, data, step=TwoUpdates(), nonfinite="skip")
    trainer.train(0, 3)
    assert [value for value, _ in trainer.storage.history("skipped_update").values()] == [0, 1, 0]


def test_a_loss_of_a_step_that_is_not_finite_stops():
    with pytest.raises(NonFiniteLoss, match="critic/loss not finite from iteration 1 on"):
        skipping(0)


def contrast(rank, world_size, num=6):
    torch.manual_seed(0)
    # float64: the scale of the logits magnifies roundings, which differ between processors
    model = CLIP(nn.Linear(4, 3), nn.Linear(5, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    g = torch.Generator().manual_seed(5)
    x, y = (torch.randn(12, width, generator=g, dtype=torch.float64) for width in (4, 5))
    own = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    trainer = distrain.Trainer(model, optimizer, [(x[own], y[own])])
    trainer.train(0, 2)
    return vector(model), trainer.storage.latest()["loss"]


def test_contrastive_gradients_over_ranks_are_those_of_one_process():
    expected, loss = contrast(0, 1)
    for world_size in (2, 3):
        for weights, shown in run_ranks(contrast, world_size, world_size):
            torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-12)
            assert shown == pytest.approx(loss, rel=1e-6)


def test_distillation_leaves_the_teacher_as_it_is():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    model = Distilled(nn.Linear(4, 3), teacher)
    before, other = copy.deepcopy(teacher.state_dict()), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(8, 4, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(4)
    ]
    distrain.Trainer(model, optimizer, data).train(0, 4)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    plain = torch.optim.SGD(other.student.parameters(), lr=0.1)
    for x, y in data:
        loss = torch.stack([*other(x, y).values()]).sum()
        plain.zero_grad()
        loss.backward()
        plain.step()
    assert torch.equal(vector(model), vector(other))


class Wrong(distrain.Step):
    def __init__(self, body):
        self.body = body

    def __call__(self, batch):
        self.body(self)


def unnamed(step):
    with step.update("critik"):
        pass


def empty(step):
    with step.update("critic"):
        pass


def early(step):
    with step.update("critic") as update:
        update.reduce()


def reduced(step):
    with step.update("critic") as update:
        update.backward(step.model["critic"].weight.sum())
        update.reduce()
        update.backward(step.model["critic"].weight.sum())


class Saves(Wrong):
    def state_dict(self):
        return {"seen": 1}


class Loads(Wrong):
    def load_state_dict(self, state):
        pass


def several(**keywords):
    model = nn.ModuleDict({"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 2)})
    optimizers = {n: torch.optim.SGD(p.parameters(), lr=0.1) for n, p in model.items()}
    settings = {"optimizer": optimizers, "step": Wrong(empty)} | keywords
    return distrain.Trainer(model, data=[torch.ones(1)], **settings)


def sgd(*parts):
    return torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"step": None}, "optim: generator, critic: expected one; several need a step"),
        ({"step": Wrong(unnamed)}, r"step: update='critik': .*did you mean critic"),
        ({"step": Wrong(empty)}, r"step: update\('critic'\): expected update.backward"),
        ({"step": Wrong(early)}, "step: update.reduce: expected update.backward"),
        ({"step": Wrong(reduced)}, "step: update.backward after update.reduce"),
        ({"step": Saves(empty)}, "step: Saves has state_dict: expected load_state_dict too"),
        ({"step": Loads(empty)}, "step: Loads has load_state_dict: expected state_dict too"),
        ({"accumulation": 2}, "trainer.accumulation=2: expected 1: Wrong takes one batch"),
        ({"strategy": DDP(comm_hook="bf16")}, "trainer.comm_hook=bf16: expected none with a step"),
        (
            {"strategy": DDP({"bucket_cap_mb": 1})},
            "trainer.ddp.bucket_cap_mb=1: expected no bucket",
        ),
        ({"strategy": "fsdp"}, "trainer.strategy=fsdp: expected one model with one optimizer"),
    ],
)
def test_mistakes(keywords, message):
    with pytest.raises(ConfigError, match=message):
        several(**keywords).train(0, 1)


def twice(loss, *, retain):
    """Return the weights after one update by two backwards of one graph."""

    def body(step):
        with step.update("critic") as update:
            value = loss(step.model["critic"](torch.ones(3, 2)).square().sum())
            update.backward(value, retain_graph=retain)
            update.backward(value)

    torch.manual_seed(0)
    trainer = several(step=Wrong(body))
    trainer.train(0, 1)
    return vector(trainer.module["critic"])


def test_a_graph_is_kept_for_weighted_losses_too():
    plain = twice(lambda total: total / 3, retain=True)
    weighted = twice(lambda total: distrain.Loss(total, 1.5), retain=True)
    torch.testing.assert_close(weighted, plain)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        twice(lambda total: distrain.Loss(total, 1.5), retain=False)


def test_an_update_that_failed_leaves_nothing_to_the_next():
    def body(step, *, fails):
        critic = step.model["critic"]
        if fails:
            with pytest.raises(ZeroDivisionError), step.update("critic") as update:
                update.backward(distrain.Loss(100 * critic(torch.ones(3, 2)).sum(), 3))
                raise ZeroDivisionError
        with step.update("critic") as update:
            update.backward(distrain.Loss(critic(torch.ones(3, 2)).square().sum(), 6))

    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        trainer = several(step=Wrong(lambda step, fails=fails: body(step, fails=fails)))
        trainer.train(0, 1)
        ends.append(vector(trainer.module))
    assert torch.equal(*ends)


def test_each_trained_parameter_is_in_one_optimizer():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    for optimizers, message in (
        ({"a": sgd(model.a), "b": sgd(model.b, model.a)}, "optim.b: parameter a.weight is also in"),
        ({"a": sgd(model.a)}, "optim: parameter b.weight is in none of a: expected it in one"),
    ):
        with pytest.raises(ConfigError, match=message):
            distrain.Trainer(model, optimizers, [], step=Wrong(empty))
