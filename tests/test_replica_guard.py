import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import Trainer
from distrain.errors import ReplicaDrift
from distrain.hooks import CallbackHook, ReplicaGuard
from distrain.hooks.replica_guard import bit_sum, checksum


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, batch):
        return self.b(self.a(batch)).square().mean()


def flip(tensor, bit=22):
    with torch.no_grad():
        tensor.view(-1).view(torch.int32)[0] ^= 1 << bit  # the largest of the mantissa: it lasts


def train(rank, what, end):
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
    try:
        trainer.train(0, end)
    except ReplicaDrift as error:
        return trainer.iter_done, str(error)
    return trainer.iter_done, None


@pytest.mark.ranks
@pytest.mark.parametrize("end", [30, 100_000])  # the last chance to notice, and half a second
@pytest.mark.parametrize("what", ["weight", "momentum"])
def test_one_flipped_bit_on_one_rank_is_found_and_named_by_all(what, end):
    results = run_ranks(train, 3, what, end)
    assert len(set(results)) == 1
    iteration, message = results[0]
    assert 30 <= iteration <= end
    assert message is not None
    assert message.startswith("rank 2 does not hold the same as rank 0")
    assert {"weight": "model.b.weight", "momentum": "optimizer.a.bias.momentum_buffer"}[
        what
    ] in message


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
    value = checksum([a, b])
    assert value.dtype is torch.float32
    assert value == int(value) < 2**24
    assert checksum([a, b]) == value
    assert checksum([b, a]) != value
