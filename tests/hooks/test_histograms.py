"""Histograms and norms of what plain PyTorch has, with nothing read back on the way."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain import HookBase, Trainer
from distrain.distributed.ddp import DDP
from distrain.errors import ConfigError
from distrain.hooks import Histograms


class Model(nn.Module):
    """Gradients of w are (3, 4) * (i + 1) in iteration i, that of b is 12 * (i + 1)."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, batch):
        return (self.w * batch[0, :2]).sum() + (self.b * batch[0, 2]).sum()


def data(factor=1.0):
    return [torch.tensor([[3.0, 4.0, 12.0]]) * (i + 1) * factor for i in range(20)]


def train(hook, *more, steps=12, factor=1.0, **keywords):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    keywords = {"window": 3, "strategy": DDP({"find_unused_parameters": True}), **keywords}
    trainer = Trainer(model, optimizer, data(factor), hooks=[hook, *more], **keywords)
    trainer.train(0, steps)
    trainer.reduction.drain(trainer.storage.iter)
    found = {(name, i): histogram for name, histogram, i in trainer.storage.histograms()}
    return trainer, found


def test_the_norm_of_all_gradients_in_each_iteration():
    trainer, _ = train(Histograms())
    assert trainer.storage.history("grad_norm").values() == [(13.0 * (i + 1), i) for i in range(12)]


def test_the_norm_is_the_one_before_clipping():
    trainer, found = train(Histograms(1), clip_norm=1.0)
    assert trainer.storage.history("grad_norm").values() == [(13.0 * (i + 1), i) for i in range(12)]
    assert found["gradients/b", 2].sum == 36.0


def test_histograms_in_the_last_iteration_of_every_second_window():
    _, found = train(Histograms(2, bins=4))
    assert {i for _, i in found} == {5, 11}
    assert {name for name, _ in found} == {
        "weights/w", "weights/b", "gradients/w", "gradients/b", "gradient_norms",
    }  # fmt: skip
    gradient = found["gradients/w", 5]
    assert (gradient.min, gradient.max, gradient.sum, gradient.num) == (18.0, 24.0, 42.0, 2)
    assert gradient.counts.tolist() == [1, 0, 0, 1]
    norms = found["gradient_norms", 5]
    assert (norms.min, norms.max) == (30.0, 72.0)
    assert found["weights/b", 5].sum == -0.5 * 12 * (1 + 2 + 3 + 4 + 5 + 6), "after the update"


def test_only_what_is_asked_for():
    _, found = train(Histograms(1, match=["b"], weights=False))
    assert {name for name, _ in found} == {"gradients/b", "gradient_norms"}
    _, found = train(Histograms(1, match="w", gradients=False))
    assert {name for name, _ in found} == {"weights/w"}


def test_fp16_gradients_are_told_without_their_scale():
    trainer, found = train(Histograms(1), precision="fp16", steps=3, factor=2.0**-10)
    assert trainer.scaler.get_scale() == 2.0**16
    assert found["gradients/b", 2].sum == pytest.approx(36.0 / 1024)
    norms = [value for value, _ in trainer.storage.history("grad_norm").values()]
    assert norms == pytest.approx([13 * (i + 1) / 1024 for i in range(3)])


class ReadBacks(TorchDispatchMode):
    """Counts where a tensor becomes a number of Python, which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += "_local_scalar_dense" in func.name() or "is_nonzero" in func.name()
        return func(*args, **(kwargs or {}))


class Watched(HookBase):
    """Watches the steps, from before forward until all hooks but the writers have run."""

    order = 89

    def __init__(self, broken=False):
        self.counts, self.broken = [], broken

    def before_step(self):
        self.mode = ReadBacks()
        self.mode.__enter__()

    def after_step(self):
        if self.broken:
            self.trainer.module.b.sum().item()
        self.mode.__exit__(None, None, None)
        self.counts.append(self.mode.num)


@pytest.mark.parametrize("keywords", [{}, {"clip_norm": 1.0}, {"precision": "bf16"}])
def test_no_step_reads_anything_back(keywords):
    watched = Watched()
    train(Histograms(2), watched, **keywords)
    assert watched.counts == [0] * 12
    broken = Watched(broken=True)
    train(Histograms(2), broken, steps=3)
    assert broken.counts == [1, 1, 1], "it would be seen"


def on_ranks(rank):
    """Let rank r have gradients of (r + 1) times the data: their mean is 1.5 times."""
    trainer, found = train(Histograms(1), factor=rank + 1.0, steps=3)
    gradients = {name: h.sum for (name, _), h in found.items() if name.startswith("gradients/")}
    return trainer.storage.history("grad_norm").values(), gradients


@pytest.mark.ranks
def test_over_ranks_they_are_those_of_the_averaged_gradients():
    results = run_ranks(on_ranks, 2)
    for norms, _ in results:
        assert norms == [(19.5, 0), (39.0, 1), (58.5, 2)]
    assert results[0][1] == {"gradients/w": 31.5, "gradients/b": 54.0}
    assert results[1][1] == {}, "the other ranks write none"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"windows": 0}, "windows=0: expected an integer >= 1"), ({"bins": 0}, "bins=0")],
)
def test_mistakes(keywords, message):
    with pytest.raises(ConfigError, match=message):
        Histograms(**keywords)


def test_a_pattern_that_matches_nothing():
    with pytest.raises(
        ConfigError, match="match=nome: expected a pattern of parameter names; (did|avail)"
    ):
        train(Histograms(match=["w", "nome"]))
