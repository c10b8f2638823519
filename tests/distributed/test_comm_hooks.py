"""Gradients that travel in a smaller form, against exact ones, with the bytes counted."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from distrain import Trainer
from distrain.distributed import DDP
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook

POWER = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, batch):
        return self.net(batch).square().mean()


def gradients(rank, steps=4, comm_hook="none", comm_options=None):
    """Return the gradients of each step, and the bytes that the hook gave to its all_reduce."""
    torch.manual_seed(0)
    model = Model()
    data = [torch.randn(4, 32, generator=torch.Generator().manual_seed(rank))]
    sizes, seen = [], []
    counted = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if tensor.is_floating_point() and tensor.dtype is not torch.float64:  # not our scalars
            sizes.append(tensor.numel() * tensor.itemsize)
        return counted(tensor, *args, **kwargs)

    dist.all_reduce = default_hooks.dist.all_reduce = powerSGD_hook.dist.all_reduce = all_reduce

    def keep(trainer):
        seen.append([p.grad.clone() for p in model.parameters()])

    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        data,
        hooks=[CallbackHook(after_backward=keep)],
        strategy=DDP(comm_hook=comm_hook, comm_options=comm_options),
    )
    trainer.train(0, steps)
    return seen, sum(sizes)


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def all_forms(rank):
    forms = {"none": {}, "bf16": {}, "fp16": {}, "powersgd": {"comm_options": POWER}}
    return {how: gradients(rank, comm_hook=how, **more) for how, more in forms.items()}


@pytest.fixture(scope="module")
def results():
    return {world_size: run_ranks(all_forms, world_size) for world_size in (2, 3)}


NUMEL = 32 * 64 + 64 + 64 + 1


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("how", "bits"), [("bf16", 8), ("fp16", 11)])
def test_half_the_bytes_and_gradients_within_rounding(results, world_size, how, bits):
    exact = [flat(step) for step in results[world_size][0]["none"][0]]
    steps, num_bytes = results[world_size][0][how]
    # each of the W parts, and each of the W sums, is rounded to `bits` bits of the largest part
    largest = max(step.abs().max() for step in exact) * world_size
    for step, expected in zip(steps, exact, strict=True):
        error = (flat(step) - expected).abs().max()
        assert 0 < error < 2 * world_size * largest * 2.0**-bits
    backwards = 4 + (world_size > 2)  # with three ranks the buckets are settled first
    assert num_bytes == 2 * NUMEL * backwards, "two bytes a gradient, where float32 has four"


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["bf16", "fp16", "powersgd"])
def test_all_ranks_get_the_same_bits(results, how):
    ranks = [result[how][0] for result in results[3]]
    for other in ranks[1:]:
        assert all(torch.equal(flat(a), flat(b)) for a, b in zip(ranks[0], other, strict=True))


@pytest.mark.ranks
def test_powersgd_is_exact_first_then_small(results):
    exact, _ = results[2][0]["none"]
    steps, num_bytes = results[2][0]["powersgd"]
    for step in (0, 1):
        torch.testing.assert_close(flat(steps[step]), flat(exact[step]))
    assert not torch.allclose(flat(steps[3]), flat(exact[3]))
    # then 32 + 64 numbers of rank 1 for the matrix; 64 + 64 + 1 beside it travel as they are
    assert num_bytes == 4 * (2 * NUMEL + 2 * (32 + 64 + 129))


@pytest.mark.ranks
def test_what_powersgd_leaves_out_of_a_step_comes_with_the_next_ones():
    steps, _ = run_ranks(gradients, 2, steps=42, comm_hook="powersgd", comm_options=POWER)[0]
    exact, _ = run_ranks(gradients, 2, steps=1)[0]
    mean = torch.stack([flat(step) for step in steps[2:]]).mean(0)
    once = (flat(steps[2]) - flat(exact[0])).norm()
    assert (mean - flat(exact[0])).norm() < 0.2 * once


def test_one_rank_has_nothing_to_compress():
    model = Model()
    data = [torch.randn(4, 32)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, data, strategy=DDP(comm_hook="bf16"))
    trainer.train(0, 2)
    assert trainer.model is model


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"comm_hook": "int8"},
            "comm_hook=int8: expected one of none, bf16, fp16, powersgd",
        ),
        (
            {"comm_hook": "bf16", "comm_options": {"rank": 2}},
            "expected none, as bf16 has none",
        ),
        (
            {"comm_hook": "powersgd", "comm_options": {"start": 2}},
            "comm_options.start: no such",
        ),
        (
            {"comm_hook": "powersgd", "comm_options": {"start_powerSGD_iter": 1}},
            "comm_options=.*start_powerSGD_iter",
        ),
    ],
)
def test_mistakes(keywords, message):
    with pytest.raises(ConfigError, match=message):
        DDP(**keywords)
