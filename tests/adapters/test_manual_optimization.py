"""A LightningModule with manual optimization against a plain loop, on several ranks, resumed."""

import copy

import pytest
import torch
from ranks import run_ranks
from resume_cases import SEEN, differing, interrupted_and_straight
from torch import nn

import distrain
from distrain.adapters import LightningManualStep, LightningModel
from distrain.errors import ConfigError
from distrain.hooks import LRScheduler

STEP = {"_target_": "distrain.adapters.LightningManualStep"}


def gan(base=nn.Module):
    """Return a module with two optimizers, as Lightning's documentation writes one."""

    class GAN(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.generator, self.critic = nn.Linear(2, 4), nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            g_opt, c_opt = self.optimizers()
            real = batch[0].flatten(1)[:, :4]
            noise = real[:, :2]
            self.toggle_optimizer(g_opt)
            loss = -self.critic(self.generator(noise)).mean()
            g_opt.zero_grad()
            self.manual_backward(loss)
            g_opt.step()
            self.untoggle_optimizer(g_opt)
            fake = self.generator(noise).detach()
            loss = self.critic(fake).mean() - self.critic(real).mean().tanh()
            c_opt.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(c_opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            c_opt.step()
            self.log("gap", loss)
            for schedule in self.lr_schedulers():
                if batch_idx % 2:
                    schedule.step()

        def configure_optimizers(self):
            g = torch.optim.Adam(self.generator.parameters(), lr=0.05)
            c = torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9)
            halves = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (g, c)]
            return [g, c], halves

    return GAN()


def batches(num=6, size=8):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 4, generator=g),) for _ in range(num)]


def plain(data):
    module = gan()
    (g_opt, c_opt), schedules = module.configure_optimizers()
    for i, (real,) in enumerate(data):
        noise = real[:, :2]
        g_opt.zero_grad()
        (-module.critic(module.generator(noise)).mean()).backward()
        g_opt.step()
        loss = module.critic(module.generator(noise).detach()).mean()
        loss = loss - module.critic(real).mean().tanh()
        c_opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.critic.parameters(), 0.5)
        c_opt.step()
        if i % 2:
            for schedule in schedules:
                schedule.step()
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def ours(rank, world_size, module=None):
    model = LightningModel(module or gan())
    optimizers, schedules = model.configure_optimizers()
    size = 8 // world_size
    data = [(real[rank * size : (rank + 1) * size],) for (real,) in batches()]
    trainer = distrain.Trainer(
        model, optimizers, data, hooks=[LRScheduler(schedules)], step=LightningManualStep()
    )
    trainer.train(0, 6)
    return nn.utils.parameters_to_vector(model.parameters()).detach(), trainer.storage.latest()


def test_it_equals_a_plain_loop_bit_for_bit():
    weights, latest = ours(0, 1)
    assert torch.equal(weights, plain(batches()))
    assert latest["optimizer_1/loss"] == latest["gap"]
    assert latest["optimizer_0/lr"] == 0.025
    assert "optimizer_0/loss" in latest


def test_a_real_module_too(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # lightning sets it at its import
    lightning = pytest.importorskip("pytorch_lightning")
    weights, _ = ours(0, 1, gan(lightning.LightningModule))
    assert torch.equal(weights, plain(batches()))


class Linear(nn.Module):
    """A loss linear in the batch, so that ranks together equal one process."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.w = nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for part in batch[0].chunk(2):
            self.manual_backward((part @ self.w).square().mean() / 2)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=0.1)


def test_ranks_take_the_mean_of_their_gradients_before_they_clip():
    expected, _ = ours(0, 1, Linear())
    for weights, _ in run_ranks(lambda rank: ours(rank, 2, Linear()), 2):
        torch.testing.assert_close(weights, expected)


class Images(nn.Module):
    """The module above on the images of the resume tests."""

    def __new__(cls):
        module = gan()
        step = module.training_step

        def training_step(batch, batch_idx):
            images, _, index, drawn = batch
            SEEN.extend(zip(index.tolist(), drawn.tolist(), strict=True))
            step([images], batch_idx)

        module.training_step = training_step
        return module


def test_resumed_is_straight_bit_for_bit(tmp_path):
    node = {
        "_target_": "distrain.adapters.LightningModel",
        "module": {"_target_": f"{__name__}.Images"},
    }
    settings = {"model": node, "step": STEP, "optim": None, "schedule": None, "workers": 2}
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, **settings)[0]
    assert whole["optimizer"].keys() == {"optimizer_0", "optimizer_1"}
    assert not differing(broken, whole)


class Accumulates(nn.Module):
    """Updates in every third iteration, by the gradients of three."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.w = nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        images, _, index, drawn = batch
        SEEN.extend(zip(index.tolist(), drawn.tolist(), strict=True))
        self.manual_backward((images.flatten(1)[:, :4] @ self.w).square().mean() / 3)
        if batch_idx % 3 == 2:
            self.optimizers().step()
        self.log("updates", float(self.global_step))
        self.log("first", self.w[0].detach())

    def configure_optimizers(self):
        return torch.optim.Adam([self.w], lr=0.1)


def test_gradients_accumulated_over_iterations_survive_a_resume(tmp_path):
    node = {
        "_target_": "distrain.adapters.LightningModel",
        "module": {"_target_": f"{__name__}.Accumulates"},
    }
    # the checkpoint of iteration 5 is amid three iterations
    settings = {"model": node, "step": STEP, "optim": None, "schedule": None}
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, **settings)[0]
    assert not differing(broken, whole)


class Rare(nn.Module):
    """Updates in every second iteration; in the others rank 0 alone has a loss of the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.body(batch[0])
        loss = hidden.square().mean()
        if batch[0][0, 0] == 1:
            loss = loss + self.head(hidden).mean()
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


def trained_rare(rank):
    torch.manual_seed(0)
    model = LightningModel(Rare())
    optimizers, _ = model.configure_optimizers()
    data = [[torch.full((2, 4), rank + 1.0)]] * 4
    distrain.Trainer(model, optimizers, data, step=LightningManualStep()).train(0, 4)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_gradients_of_some_ranks_alone_are_kept_on_all():
    first, second = run_ranks(trained_rare, 2)
    assert torch.equal(first, second)


class Counts(Linear):
    """Steps twice in odd iterations; notes its progress."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        for _ in range(1 + batch_idx % 2):
            super().training_step(batch, batch_idx)
            self.seen.append((batch_idx, self.global_step, self.trainer.current_epoch))


def test_every_update_counts_as_a_global_step():
    model = LightningModel(Counts(), epoch_iters=2)
    optimizers, _ = model.configure_optimizers()
    trainer = distrain.Trainer(model, optimizers, batches(), step=LightningManualStep())
    trainer.train(0, 4)
    seen = [(0, 1, 0), (1, 2, 0), (1, 3, 0), (2, 4, 1), (3, 5, 1), (3, 6, 1)]
    assert model.module.seen == seen
    assert trainer.state_dict()["step"]["num_updates"] == 6


def test_mistakes():
    model = LightningModel(gan())
    optimizers, _ = model.configure_optimizers()
    automatic = copy.deepcopy(model.module)
    automatic.automatic_optimization = True
    for settings, message in (
        ({"precision": "fp16"}, "trainer.precision=fp16: expected bf16 or fp32 with manual"),
        ({"model": LightningModel(automatic)}, "step: LightningManualStep: expected .* not GAN"),
    ):
        kept = {"model": model} | settings
        chosen = kept["model"].module
        own = {"a": torch.optim.SGD(chosen.parameters(), lr=0.1)}
        with pytest.raises(ConfigError, match=message):
            distrain.Trainer(
                optimizer=own, data=batches(), step=LightningManualStep(), **kept
            ).train(0, 1)
    with pytest.raises(ConfigError, match="optim: optimizer_0, optimizer_1: expected one; several"):
        distrain.Trainer(model, optimizers, batches())
