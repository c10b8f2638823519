"""Samples, tokens and FLOPs a second, against numbers worked out by hand."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distrain import Step, Trainer
from distrain.data.loader import TrainLoader
from distrain.errors import ConfigError
from distrain.hooks import Throughput
from distrain.hooks import throughput as module
from distrain.hooks.throughput import PEAK_TFLOPS, peak_tflops

B, IN, MIDDLE, OUT = 8, 5, 7, 3
FORWARD = 2 * B * IN * MIDDLE + 2 * B * MIDDLE * OUT
# backward: the weights of both layers, and the input of the second alone
FLOPS = 2 * FORWARD + 2 * B * MIDDLE * OUT


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(IN, MIDDLE), nn.Linear(MIDDLE, OUT)

    def forward(self, batch):
        return self.b(self.a(batch)).square().mean()


def train(rank=0, *, world_size=1, accumulation=1, max_iter=9, data=None, hook=None):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if data is None:
        dataset = TensorDataset(torch.randn(32, IN))
        data = TrainLoader(
            dataset,
            batch_size=B * world_size,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            collate=lambda samples: torch.stack([sample[0] for sample in samples]),
        )
    hooks = [hook] if hook else []
    trainer = Trainer(model, optimizer, data, hooks=hooks, window=4, accumulation=accumulation)
    trainer.train(0, max_iter)
    return trainer


def perf(trainer):
    histories = trainer.storage.histories()
    return {n: h.values() for n, h in histories.items() if n.startswith("perf/")}


@pytest.fixture
def clock(monkeypatch):
    """Seconds are steps: half a second each."""

    class StepClock:
        hook = None

        def perf_counter(self):
            return 0.5 * self.hook.trainer.iter_done

    clock = StepClock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_rates_by_hand(clock):
    clock.hook = Throughput(tokens_per_sample=10, peak_tflops=2e-9)
    found = perf(train(hook=clock.hook))
    assert found["perf/samples_per_s"] == [(16.0, 3), (16.0, 7)]  # 8 in half a second
    assert found["perf/tokens_per_s"] == [(160.0, 3), (160.0, 7)]
    assert found["perf/tflops_per_rank"][0] == (2 * FLOPS / 1e12, 3)
    assert found["perf/mfu"][0][0] == pytest.approx(2 * FLOPS / 1e12 / 2e-9)


def test_flops_are_forward_and_backward_of_the_whole_step():
    for accumulation in (1, 2, 4):  # parts of the same batch
        hook = Throughput()
        train(hook=hook, accumulation=accumulation, max_iter=3)
        assert hook._flops == FLOPS


def test_a_layer_whose_input_needs_a_gradient_costs_three_forwards():
    hook = Throughput()
    data = [torch.randn(B, IN, requires_grad=True)]
    train(hook=hook, data=data, max_iter=1)
    assert hook._flops == 3 * FORWARD


def test_flops_that_are_given(clock):
    clock.hook = Throughput(flops_per_sample=1e9)
    found = perf(train(hook=clock.hook))
    assert found["perf/tflops_per_rank"][0] == (2 * B * 1e9 / 1e12, 3)
    assert "perf/mfu" not in found  # the CPU's peak is not known


def test_a_compiled_model_is_not_counted(monkeypatch):
    monkeypatch.setattr(Model, "_compiled_call_impl", Model._call_impl)
    hook = Throughput()
    assert "perf/tflops_per_rank" not in perf(train(hook=hook))
    assert hook._flops is None


def test_counting_changes_no_bit():
    plain, counted = train(), train(hook=Throughput())
    for a, b in zip(plain.module.parameters(), counted.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_samples_of_other_data(clock):
    clock.hook = Throughput(samples_per_step=100)
    found = perf(train(hook=clock.hook, data=[torch.ones(4, IN)]))
    assert found["perf/samples_per_s"][0] == (200.0, 3)
    clock.hook = Throughput()
    found = perf(train(hook=clock.hook, data=DataLoader(torch.ones(8, IN), batch_size=4)))
    assert found["perf/samples_per_s"][0] == (8.0, 3)
    clock.hook = Throughput()
    found = perf(train(hook=clock.hook, data=[torch.ones(4, IN)]))
    assert "perf/samples_per_s" not in found


def ranks(rank):
    hook = Throughput(peak_tflops=1.0)
    found = perf(train(rank, world_size=2, hook=hook))
    return hook._flops, hook._samples, found


@pytest.mark.ranks
def test_two_ranks_count_each_its_share():
    (flops, samples, found), second = run_ranks(ranks, 2)
    assert (flops, samples, found) == second
    assert (flops, samples) == (FLOPS, 2 * B)
    speed = found["perf/samples_per_s"][0][0] / samples  # steps a second
    assert found["perf/tflops_per_rank"][0][0] == pytest.approx(speed * flops / 1e12)


def test_a_first_step_that_fails_leaves_no_counter(monkeypatch):
    monkeypatch.setattr(Model, "forward", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(hook=Throughput())
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", 70.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A6000", 154.8),
        ("Something else", None),
    ],
)
def test_peaks(card, peak):
    assert peak_tflops(card) == peak


def test_each_peak_is_found_by_its_name():
    assert {name: peak_tflops(f"NVIDIA {name}") for name in PEAK_TFLOPS} == PEAK_TFLOPS


@pytest.mark.parametrize("name", ["tokens_per_sample", "peak_tflops", "samples_per_step"])
def test_wrong_arguments(name):
    with pytest.raises(
        ConfigError, match=f"{name}=0: expected (a finite number > 0|an integer >= 1)"
    ):
        Throughput(**{name: 0})


class TwoUpdates(Step):
    def __call__(self, batch):
        with self.update("a") as update:
            update.backward(self.model.a(batch).square().mean())
        with self.update("b") as update:
            hidden = self.model.a(batch).detach()
            update.backward(self.model.b(hidden).square().mean())


def test_operations_of_a_step_of_ones_own_are_those_of_all_updates():
    model, hook = Model(), Throughput(samples_per_step=B)
    optimizers = {
        "a": torch.optim.SGD(model.a.parameters(), lr=0.1),
        "b": torch.optim.SGD(model.b.parameters(), lr=0.1),
    }
    data = [torch.randn(B, IN) for _ in range(2)]
    Trainer(model, optimizers, data, hooks=[hook], step=TwoUpdates()).train(0, 2)
    a, b = 2 * B * IN * MIDDLE, 2 * B * MIDDLE * OUT
    assert hook._flops == 2 * a + a + 2 * b  # forward, weights of a; its forward again; those of b
