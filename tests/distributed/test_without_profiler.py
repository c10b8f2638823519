"""optimizer.step() without the profiler range: the same numbers; hooks and profilers see it."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from distrain.distributed import without_profiler
from distrain.distributed.without_profiler import clear_gradients, update


class Counted(torch.optim.SGD):
    """An optimizer with a zero_grad of its own."""

    cleared = 0

    def zero_grad(self, set_to_none=True):
        self.cleared += 1
        super().zero_grad(set_to_none)


def of_a_line(kind=torch.optim.SGD, **keywords):
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = kind(model.parameters(), lr=0.5, **keywords)
    model(torch.tensor([[1.0, 2.0, 4.0]])).sum().backward()
    return model, optimizer


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_numbers_are_those_of_step(kind):
    model, optimizer = of_a_line(kind)
    other, theirs = of_a_line(kind)
    update(optimizer)
    theirs.step()
    assert not torch.equal(model.weight, torch.ones(1, 3))
    assert torch.equal(model.weight, other.weight)


def test_by_hand():
    model, optimizer = of_a_line()
    update(optimizer)
    assert model.weight.tolist() == [[0.5, 0.0, -1.0]]
    clear_gradients(optimizer)
    assert model.weight.grad is None


def test_who_listens_hears_of_each_step():
    heard = []
    _, optimizer = of_a_line()
    before = optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    after = optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    update(optimizer)
    before.remove()
    after.remove()
    update(optimizer)
    of_all = register_optimizer_step_post_hook(lambda *_: heard.append("all"))
    update(optimizer)
    of_all.remove()
    assert heard == ["before", "after", "all"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    update(optimizer)
    assert optimizer._opt_called
    schedule.step()  # does not warn


def test_a_profiler_sees_the_record():
    _, optimizer = of_a_line()
    with torch.profiler.profile() as profile:
        update(optimizer)
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_an_optimizer_with_a_way_of_its_own_keeps_it():
    class Doubling(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            return super().step(closure)

    model, optimizer = of_a_line(Doubling)
    update(optimizer)
    assert model.weight.tolist() == [[0.0, -1.0, -3.0]]
    _, counted = of_a_line(Counted)
    clear_gradients(counted)
    assert counted.cleared == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.autograd.profiler, "_is_profiler_enabled"),
        (optimizer_module, "_global_optimizer_pre_hooks"),
        (optimizer_module, "_global_optimizer_post_hooks"),
        (torch.optim.Optimizer, "profile_hook_step"),
    ],
)
def test_without_a_private_name_of_torch_the_wrapped_step_is_called(owner, name, monkeypatch):
    calls = []
    _, optimizer = of_a_line()
    wrapped = type(optimizer).step
    monkeypatch.delattr(owner, name)
    monkeypatch.setattr(without_profiler, "_STEP_WRAPPER", without_profiler._step_wrapper())

    class Step:  # looks like the wrapped step; torch's own cannot run without the name
        __code__ = wrapped.__code__

        def __get__(self, optimizer, kind):
            return self if optimizer is None else lambda: calls.append("wrapped")

        def __wrapped__(self, optimizer):
            calls.append("unwrapped")

    monkeypatch.setattr(type(optimizer), "step", Step())
    update(optimizer)
    assert calls == ["wrapped"]


def test_without_the_parts_of_ddps_forward_it_is_torchs_own(monkeypatch):
    calls = []
    monkeypatch.setattr(without_profiler, "_HAS_DDP_FORWARD", False)
    monkeypatch.setattr(DistributedDataParallel, "forward", lambda self, *args: calls.append(args))
    ddp = without_profiler.UnprofiledDDP.__new__(without_profiler.UnprofiledDDP)
    without_profiler.UnprofiledDDP.forward(ddp, 1, 2)
    assert calls == [(1, 2)]
