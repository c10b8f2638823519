"""BatchNorm's statistics over batches and ranks, against plain sums over all values."""

import copy
import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import EventStorage, Trainer, get_event_storage
from distrain.data.loader import TrainLoader
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook, EvalHook, PreciseBN

BATCH, NUM = 16, 3


class Points(torch.utils.data.Dataset):
    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.x = 100 + 5 * torch.randn(96, 3, 4, 4, generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0 * torch.rand(())  # draws, as augmentation does


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3)
        self.second = nn.BatchNorm2d(5)
        self.frozen = nn.BatchNorm2d(5)
        self.unused = nn.BatchNorm1d(2, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("center", torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, batch):
        self.calls += 1
        self.center = 0.9 * self.center.detach() + 0.1 * batch.mean()  # another tensor
        get_event_storage().put_scalar("calls", self.calls)
        x = self.frozen(self.second(self.conv(self.first(batch))))
        return self.dropout(x).square().mean()


def trainer_of(rank=0, world_size=1, *, hooks, model, steps=2, workers=0, **keywords):
    loader = TrainLoader(
        Points(), batch_size=BATCH, rank=rank, world_size=world_size, seed=5, workers=workers,
        seed_samples=False, accumulation=keywords.get("accumulation", 1),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = Trainer(model, optimizer, loader, hooks=hooks, **keywords)
    trainer.train(0, steps)
    loader.close()
    return trainer


def fresh(**keywords):
    torch.manual_seed(0)
    return Net(**keywords)


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


def recomputed(rank, world_size, sync, accumulation=1):
    model = convert_sync_batchnorm(fresh()) if sync and world_size > 1 else fresh()
    hooks = [PreciseBN(NUM)]
    trainer_of(rank, world_size, hooks=hooks, model=model, accumulation=accumulation)
    return statistics(model), model.state_dict()


def union(weights, iterations, shares=1):
    """Return the statistics as one process computes them from all batches, cut into shares.

    Everything that came into a layer is kept, and put together in float64.
    """
    model = fresh().double()
    model.load_state_dict(weights)
    model.train()
    values = {"first": [], "second": []}
    for name, seen in values.items():
        getattr(model, name).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
    loader = TrainLoader(Points(), batch_size=BATCH, seed=5, seed_samples=False)
    batches = loader.batches(iterations)
    with torch.no_grad(), EventStorage(0):
        for _ in range(NUM):
            for part in next(batches).double().chunk(shares):
                model(part)
    found = {}
    for name, seen in values.items():
        flat = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], dim=1)  # (C, n)
        found[f"{name}.running_mean"] = flat.mean(1)
        found[f"{name}.running_var"] = flat.var(1)  # divides by n - 1
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sync", [True, False])
def test_all_ranks_get_what_one_process_gets_from_all_batches(world_size, sync):
    results = run_ranks(recomputed, world_size, world_size, sync)
    statistics, weights = results[0]
    for other, _ in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in statistics.items())
    expected = union(weights, 2, shares=1 if sync else world_size)
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name].double(), value, rtol=2e-5, atol=2e-5)
    start = fresh().state_dict()
    for name in ("frozen", "unused"):
        assert torch.equal(statistics[f"{name}.running_mean"], start[f"{name}.running_mean"])


def test_a_step_of_several_forwards_reads_as_many_samples():
    statistics, weights = recomputed(0, 1, sync=False, accumulation=4)
    for name, value in union(weights, 2, shares=4).items():
        torch.testing.assert_close(statistics[name].double(), value, rtol=2e-5, atol=2e-5)


def test_it_differs_from_the_moving_average():
    plain = fresh()
    trainer_of(hooks=[], model=plain)
    precise, _ = recomputed(0, 1, sync=False)
    assert (plain.first.running_mean - precise["first.running_mean"]).abs().min() > 50


def run(model, hooks, steps=6, **keywords):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    trainer = trainer_of(hooks=hooks, model=model, steps=steps, **keywords)
    return trainer, (torch.rand(2), random.random(), np.random.rand())


def test_nothing_else_changes():
    modes = []
    plain, precise = fresh(dropout=0.5), fresh(dropout=0.5)
    look = CallbackHook(after_step=lambda t: modes.append(t.module.training))
    straight, drawn = run(plain, [])
    trainer, also_drawn = run(precise, [PreciseBN(NUM, period=2), look])
    assert torch.equal(drawn[0], also_drawn[0])
    assert drawn[1:] == also_drawn[1:]
    for name, value in plain.state_dict().items():  # dropout draws, and so do the samples
        if "running" not in name:
            assert torch.equal(value, precise.state_dict()[name]), name
    assert modes == [True] * 6
    assert precise.calls.item() == 6
    assert not precise.first._forward_pre_hooks
    losses = [t.storage.history("loss").values() for t in (straight, trainer) if not _drain(t)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def _drain(trainer):
    trainer.reduction.drain(trainer.storage.iter)


def test_before_each_evaluation_and_at_the_end():
    seen = []
    model = fresh()
    evaluation = EvalHook(2, function=lambda: seen.append(statistics(model)) or {})
    hook = PreciseBN(NUM, period=2)
    trainer_of(hooks=[evaluation, hook], model=model, steps=4)
    assert len(seen) == 2
    expected = union(model.state_dict(), 4)
    torch.testing.assert_close(
        seen[1]["second.running_var"].double(), expected["second.running_var"], rtol=1e-4, atol=1e-5
    )


def test_loader_processes_of_its_own_end_with_it():
    model = fresh()
    left = []
    look = CallbackHook(after_train=lambda t: left.append(len(t.data._open)))
    hooks = [PreciseBN(NUM), look]
    look.order = 58
    trainer_of(hooks=hooks, model=model, workers=1)
    plain, _ = recomputed(0, 1, sync=False)
    assert all(torch.equal(value, plain[name]) for name, value in statistics(model).items())
    assert left == [1], "the training's own"


def test_a_compiled_model_is_not_compiled_anew():
    graphs, by_training = [], []
    model = fresh()
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    count = CallbackHook(after_step=lambda _: by_training.append(len(graphs)))
    trainer_of(hooks=[PreciseBN(NUM), count], model=model)
    torch._dynamo.reset()
    assert len(graphs) == by_training[-1] > 0
    plain, _ = recomputed(0, 1, sync=False)
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-5)


def test_a_model_without_batch_norm_reads_nothing():
    model = nn.Linear(4, 1)
    hook = PreciseBN(NUM)
    hook.trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), [])
    before = copy.deepcopy(model.state_dict())
    hook.run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keywords", [{"num_iters": 0}, {"period": 0}])
def test_mistakes(keywords):
    with pytest.raises(ConfigError, match="=0: expected an integer >= 1"):
        PreciseBN(**keywords)


def test_data_that_cannot_be_read_beside_the_training():
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.ones(2, 3, 4, 4)]
    with pytest.raises(ConfigError, match="loaded from any iteration, got list"):
        Trainer(model, optimizer, data, hooks=[PreciseBN()]).train(0, 2)
