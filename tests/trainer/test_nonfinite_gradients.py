"""Updates that are not finite: left out on all ranks alike, and an end after too many in a row."""

import logging
import math

import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import Trainer, get_event_storage
from distrain.errors import ConfigError, NonFiniteLoss
from distrain.trainer.nonfinite_gradients import SkippedUpdates


class Line(nn.Module):
    """The loss is the sum of w, spoiled as a test says; BatchNorm sees the batch."""

    def __init__(self, spoil):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.spoil = spoil

    def forward(self, batch):
        at = get_event_storage().iter
        seen = self.norm(self.spoil["batch"](batch, at))
        return self.spoil["loss"](self.w.sum() + 0 * seen.sum(), self.w, at)


def train(iterations, *, loss=lambda loss, w, at: loss, batch=lambda x, at: x, **keywords):
    """Return (trainer, model, what ended it) after training with a learning rate of 0.1."""
    model = Line({"loss": loss, "batch": batch})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keywords = {"nonfinite": "skip", "window": 5, **keywords}
    trainer = Trainer(model, optimizer, [torch.tensor([[1.0], [3.0]])], **keywords)
    try:
        trainer.train(0, iterations)
    except NonFiniteLoss as error:
        return trainer, model, str(error)
    return trainer, model, None


class Centred(nn.Module):
    """Assigns a buffer in each forward, as DINO does, and has one that cannot be written."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("ones", torch.ones(1).expand(3))

    def forward(self, batch):
        batch = batch.mean() * (math.nan if get_event_storage().iter == 1 else 1.0)
        self.center = 0.5 * self.center + 0.5 * batch
        return (self.w * self.center).sum()


def test_a_buffer_that_was_assigned_is_restored():
    model = Centred()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, [torch.ones(2)], nonfinite="skip").train(0, 3)
    assert model.center.item() == 0.75  # of two batches
    assert model.w.item() == pytest.approx(1 - 0.1 * (0.5 + 0.75))


def nan_on(rank, world_size):
    """Spoil one rank's loss or batch; every rank must do the same."""
    mine = rank == world_size - 1
    found = {}
    # 1: a loss that is not finite and whose gradients are: nobody else would notice
    trainer, model, error = train(
        6, loss=lambda loss, w, at: loss + math.inf if mine and at in (2, 3) else loss
    )
    skipped = [at for value, at in trainer.storage.history("skipped_update").values() if value]
    found["constant"] = (skipped, round(model.w[0].item(), 6), error)
    # 2: a batch with a NaN: it must not stay in the running mean of any rank
    trainer, model, error = train(4, batch=lambda x, at: x * math.nan if mine and at == 1 else x)
    found["batch"] = (round(model.w[0].item(), 6), round(model.norm.running_mean.item(), 6), error)
    # 3: too many in a row
    trainer, model, error = train(
        50,
        loss=lambda loss, w, at: loss * math.nan if mine and at >= 7 else loss,
        max_skipped=3,
    )
    found["end"] = (trainer.iter, round(model.w[0].item(), 6), error)
    # 4: never so many in a row
    trainer, model, error = train(
        40, loss=lambda loss, w, at: loss * math.nan if mine and at % 4 else loss, max_skipped=3
    )
    found["not in a row"] = (round(model.w[0].item(), 6), error)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_one_rank_has_all_ranks_leave_out(world_size):
    results = run_ranks(nan_on, world_size, world_size)
    assert all(found == results[0] for found in results)
    found = results[0]
    assert found["constant"] == ([2, 3], 0.6, None)  # 1 - 4 * 0.1
    # momentum 0.1 towards the mean 2 of the batch, three times: 2 * (1 - 0.9**3)
    assert found["batch"] == (0.7, 0.542, None)
    assert found["not in a row"] == (0.0, None)  # 10 updates of 40
    at, w, error = found["end"]
    assert (at, w) == (10, 0.3)  # 7 updates, then 3 that are left out, then the end
    assert error.startswith(
        f"loss not finite on rank {world_size - 1} of {world_size} at iteration 10, after 3 "
        "skipped updates in a row (trainer.max_skipped=3)"
    )


def test_gradients_alone_count_too_and_clamping_does_not_hide_them():
    """The root at 0 has the gradient inf; clip_value would make 0.5 of it."""
    kwargs = {"loss": lambda loss, w, at: loss + torch.sqrt(0 * w[0]) if at < 3 else loss}
    trainer, model, error = train(5, clip_value=0.5, **kwargs)
    assert error is None
    assert model.w.tolist() == pytest.approx([0.9, 0.9])  # 2 updates of 0.1 * 0.5
    trainer, model, error = train(5, max_skipped=1, **kwargs)
    assert trainer.iter == 1
    assert error.startswith(
        "the losses are finite, but the norm of the gradients is nan at iteration 1"
    )


def test_the_first_of_a_row_is_logged(caplog):
    with caplog.at_level(logging.WARNING, logger="distrain"):
        train(8, loss=lambda loss, w, at: loss * math.nan if at in (2, 3, 6) else loss)
    assert [record.getMessage() for record in caplog.records] == [
        f"loss not finite on rank 0 of 1 at iteration {at}: this update is skipped" for at in (2, 6)
    ]


def test_the_scaler_lowers_its_scale_and_such_updates_do_not_count():
    scales = []

    def overflow(loss, w, at):
        scale = trainers[0].scaler.get_scale()
        scales.append(scale)
        return loss + (torch.sqrt(0 * w[0]) if scale > 2**12 else 0.0)

    trainers = []
    model = Line({"loss": overflow, "batch": lambda x, at: x})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainers.append(
        Trainer(
            model,
            optimizer,
            [torch.tensor([[1.0], [3.0]])],
            nonfinite="skip",
            max_skipped=1,
            precision="fp16",
        )
    )
    trainers[0].train(0, 7)
    assert scales == [2.0**16, 2.0**15, 2.0**14, 2.0**13, 2.0**12, 2.0**12, 2.0**12]
    assert model.w.tolist() == pytest.approx([0.7, 0.7])
    # a loss that is not finite counts, whatever the scale
    trainer, model, error = train(
        9, loss=lambda loss, w, at: loss * math.nan, precision="fp16", max_skipped=2
    )
    assert trainer.iter == 2
    assert error.startswith("loss not finite")
    assert trainer.scaler.get_scale() == 2.0**14


def test_gradients_that_never_are_finite_end_an_fp16_run_too():
    trainer, _, error = train(
        99,
        loss=lambda loss, w, at: loss + torch.sqrt(0 * w[0]),
        precision="fp16",
        max_skipped=2,
    )
    assert trainer.iter == 18  # 16 halvings from 2**16 to 1, then 2 that count, then the end
    assert "the norm of the gradients is nan" in error


def norm_not_finite(rank):
    # the loss stays finite: without the norm the run would go on and save NaN weights
    spoil = {"loss": lambda loss, w, at: loss + torch.sqrt(0 * w[0]) if rank == 1 else loss}
    _, model, error = train(12, nonfinite="stop", clip_norm=1.0, **spoil)
    return error


@pytest.mark.ranks
def test_stop_knows_the_norm_that_clipping_has_computed():
    errors = run_ranks(norm_not_finite, 2)
    assert errors[0] == errors[1]
    assert "grad_norm" in errors[0]
    assert "not finite from iteration 0 on" in errors[0]


def test_stop_with_a_scaler_leaves_overflows_to_it():
    trainer, _, error = train(
        12,
        loss=lambda loss, w, at: loss + (torch.sqrt(0 * w[0]) if at < 2 else 0.0),
        nonfinite="stop",
        clip_norm=1.0,
        precision="fp16",
    )
    assert error is None
    norms = [value for value, _ in trainer.storage.history("grad_norm").values()]
    assert not any(map(math.isfinite, norms[:2]))
    assert norms[2:] == pytest.approx([math.sqrt(2)] * 10)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_it_changes_no_bit_of_a_finite_run(nonfinite):
    def curved(loss, w, at):
        return (w**2).sum() / 3

    _, model, _ = train(7, loss=curved, nonfinite=nonfinite)
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(7):
        ((w**2).sum() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.w, w)


def test_the_limit_is_checked():
    with pytest.raises(ConfigError, match="trainer.max_skipped=0: expected an integer >= 1"):
        train(1, max_skipped=0)


def test_without_the_spoiling_another_rank_would_not_know():
    """The negative control of the first case: an infinite loss can have finite gradients."""
    w = torch.ones((), requires_grad=True)
    (w + math.inf).backward()
    assert w.grad == 1
    w.grad = None
    SkippedUpdates.propagate_nonfinite(w + math.inf).backward()
    assert w.grad.isnan()
