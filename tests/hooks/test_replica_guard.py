import sys
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import Trainer
from distrain.errors import ReplicaDrift
from distrain.events.reduction import ScalarReduction
from distrain.hooks import CallbackHook, ReplicaGuard
from distrain.hooks.replica_guard import bit_sum, bit_sums, checksum


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, batch):
        return self.b(self.a(batch)).square().mean()


def flip(tensor, bit=22):
    with torch.no_grad():
        tensor.view(-1).view(torch.int32)[0] ^= 1 << bit  # the largest of the mantissa: it lasts


def train(rank, what, end, step_s=None):
    """Train with steps of `step_s` seconds by the clock of the reduction; None leaves it alone."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def disturb(trainer):
        if trainer.iter == 20 and rank == 2:
            if what == "weight":
                flip(model.b.weight)
            elif what == "momentum":
                flip(optimizer.state[model.a.bias]["momentum_buffer"])

    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))]
    hooks = [ReplicaGuard(10), CallbackHook(after_step=disturb)]
    trainer = Trainer(model, optimizer, data, hooks=hooks, window=5)
    if step_s is not None:
        clock = SimpleNamespace(perf_counter=lambda: step_s * trainer.iter_done)
        sys.modules[ScalarReduction.__module__].time = clock
    try:
        trainer.train(0, end)
    except ReplicaDrift as error:
        return trainer.iter_done, str(error)
    return trainer.iter_done, None


NAMES = {"weight": "model.b.weight", "momentum": "optimizer.a.bias.momentum_buffer"}


@pytest.mark.ranks
@pytest.mark.parametrize("step_s", [None, 0.002, 0.2])  # verdicts after 500 steps, or after a few
@pytest.mark.parametrize("end", [30, 100_000])  # the last chance to notice, and soon enough
@pytest.mark.parametrize("what", ["weight", "momentum"])
def test_one_flipped_bit_on_one_rank_is_found_and_named_by_all(what, end, step_s):
    results = run_ranks(train, 3, what, end, step_s)
    assert len(set(results)) == 1
    iteration, message = results[0]
    assert 30 <= iteration <= end
    assert message is not None
    # whenever the verdict comes, it is on the tensors of the first checksum after the flip
    assert message.startswith("replicas differ: rank 2 from rank 0 after iteration 30, in ")
    assert NAMES[what] in message


@pytest.mark.ranks
def test_a_guard_of_every_step_comes_to_a_verdict():
    """A checksum is always on its way; the earlier ones are judged all the same."""

    def train_on(rank):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hooks = [ReplicaGuard(1)]
        trainer = Trainer(model, optimizer, [torch.ones(1, 3)], hooks=hooks, window=1)
        clock = SimpleNamespace(perf_counter=lambda: trainer.iter_done)
        sys.modules[ScalarReduction.__module__].time = clock
        with torch.no_grad():
            model.b.weight.fill_(rank)
        with pytest.raises(ReplicaDrift, match="after iteration 1, in model.b.weight"):
            trainer.train(0, 50)
        return trainer.iter_done

    assert max(run_ranks(train_on, 2)) < 10


@pytest.mark.ranks
def test_equal_replicas_train_on():
    assert run_ranks(train, 3, None, 60) == [(60, None)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_every_element_counts(dtype):
    tensor = torch.ones(5, dtype=dtype)
    before = bit_sum(tensor)
    tensor[3] = 0
    assert bit_sum(tensor) != before


def test_a_checksum_is_exact_in_float32_and_knows_the_order():
    a, b = torch.randn(7), torch.randn(7)
    value = checksum(bit_sums([a, b]))
    assert value.dtype is torch.float32
    assert value == int(value) < 2**24
    assert checksum(bit_sums([a, b])) == value
    assert checksum(bit_sums([b, a])) != value
