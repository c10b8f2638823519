"""Evaluation: each sample once, as training calls the model, and no trace of it in training."""

import random
import re

import numpy as np
import pytest
import torch
from checkpoint_cases import InlineStore, identical
from ranks import run_ranks
from torch import nn

from distrain import HookBase, Trainer, get_event_storage
from distrain.checkpoint.store import CheckpointStore
from distrain.data.loader import EvalLoader, TrainLoader
from distrain.distributed import DDP
from distrain.errors import ConfigError
from distrain.hooks import EMA, BestCheckpointer, EvalHook, PeriodicCheckpointer, PreciseBN
from distrain.trainer.evaluate import evaluate

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return torch.tensor(float(index))


class Model(nn.Module):
    def forward(self, batch):
        assert not self.training
        return batch.mean()

    def metrics(self, batch):
        return {"value": batch, "is_even": (batch % 2 == 0).float()}


def evaluate_on(rank, num, batch_size, model):
    world_size = torch.distributed.get_world_size()
    loader = EvalLoader(Samples(num), batch_size=batch_size, rank=rank, world_size=world_size)
    return evaluate(model.train(), loader, device=CPU), model.training


@pytest.mark.ranks
@pytest.mark.parametrize(("num", "batch_size"), [(10, 2), (7, 3), (1, 4), (2, 1)])
def test_every_sample_counts_once_on_any_number_of_ranks(num, batch_size):
    expected = {"value": (num - 1) / 2, "is_even": ((num + 1) // 2) / num}
    for result, is_training in run_ranks(evaluate_on, 3, num, batch_size, Model()):
        assert result == pytest.approx(expected)
        assert is_training


def test_without_metrics_losses_are_weighted_by_the_batch():
    class Plain(nn.Module):
        def forward(self, batch):
            return batch.mean()

    loader = EvalLoader(Samples(7), batch_size=3)
    assert evaluate(Plain(), loader, device=CPU) == {"loss": 3.0}


def test_a_metric_is_one_value_a_sample():
    class Wrong(Model):
        def metrics(self, batch):
            return {"accuracy": batch.mean()}

    with pytest.raises(ConfigError, match=r"'accuracy' is \[\]: expected one value.*\[3\]"):
        evaluate(Wrong(), EvalLoader(Samples(7), batch_size=3), device=CPU)


class Rare(nn.Module):
    """Gives one metric only where a batch has samples from 4 on."""

    def forward(self, batch):
        return batch.mean()

    def metrics(self, batch):
        metrics = {"all": torch.ones(len(batch))}
        return metrics | ({"rare": batch} if batch.max() >= 4 else {})


def test_a_metric_of_some_batches_is_divided_by_their_samples():
    loader = EvalLoader(Samples(8), batch_size=4)
    assert evaluate(Rare(), loader, device=CPU) == {"all": 1.0, "rare": 5.5}


@pytest.mark.ranks
def test_and_so_it_is_over_ranks():
    # shares 0-2, 3-5, 6-8: the first rank has no such batch, the second one, the third all
    expected = {"all": 1.0, "rare": (4 + 5 + 6 + 7 + 8) / 5}
    assert run_ranks(evaluate_on, 3, 9, 1, Rare()) == [(expected, True)] * 3


def test_metrics_is_to_return_a_dict():
    class Wrong(Model):
        def metrics(self, batch):
            return batch

    with pytest.raises(ConfigError, match=r"metrics\(\) returned Tensor: expected a dict"):
        evaluate(Wrong(), EvalLoader(Samples(7), batch_size=3), device=CPU)


def test_the_name_of_a_metric_is_text():
    class PerClass(Model):
        def metrics(self, batch):
            return {0: batch}

    with pytest.raises(ConfigError, match=r"metrics\(\) returned 0 as a name: expected text"):
        evaluate(PerClass(), EvalLoader(Samples(7), batch_size=3), device=CPU)


class Points(torch.utils.data.Dataset):
    """Points that draw from every generator without a seed of their own."""

    def __init__(self, num=24, draws=False):
        self.x = torch.randn(num, 4, generator=torch.Generator().manual_seed(0))
        self.draws = draws

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.draws:
            random.random(), np.random.rand(), torch.rand(())
        return self.x[index]


class Net(nn.Module):
    """A network whose first normalisation is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.frozen, self.norm = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.out, self.drop = nn.Linear(4, 1), nn.Dropout(0.5)
        self.frozen.eval()
        self.seen = []

    def values(self, x):
        y = self.out(self.drop(self.norm(self.frozen(x))))
        self.seen.append((self.training, y.dtype))
        return y[:, 0].float()

    def forward(self, x):
        return self.values(x).square().mean()

    def metrics(self, x):
        random.random(), np.random.rand(), torch.rand(())
        return {"value": self.values(x)}


def trained(rank=0, world_size=1, *, evaluates=True, draws=True, hooks=None, iters=4, **settings):
    """Train with an evaluation after each iteration; return the trainer."""
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    net = Net()
    share = {"rank": rank, "world_size": world_size, "seed_samples": False}
    more = {
        "ema": EMA(0.5),
        "precise_bn": PreciseBN(2, period=2),
        "eval": EvalHook(1, eval_loader=EvalLoader(Points(draws=draws), batch_size=5, **share)),
    }
    trainer = Trainer(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        TrainLoader(Points(draws=draws), batch_size=12, **share),
        hooks=(hooks or {}) | (more if evaluates else {}),
        **settings,
    )
    trainer.train(0, iters)
    return trainer


def test_each_part_of_a_model_keeps_its_own_mode():
    module = trained().module
    modes = {name: part.training for name, part in module.named_modules()}
    assert modes == {"": True, "frozen": False, "norm": True, "out": True, "drop": True}
    assert module.frozen.running_mean.tolist() == [0.0] * 4
    assert module.norm.running_mean.abs().sum() > 0


def test_a_model_that_is_in_eval_mode_as_a_whole_is_trained():
    net = Net().eval()
    data = [torch.randn(4, 4)]
    Trainer(net, torch.optim.SGD(net.parameters(), lr=0.1), data).train(0, 1)
    assert all(part.training for part in net.modules())


def test_a_train_method_that_freezes_parts_has_its_way():
    class Freezing(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    net = Freezing()
    assert net.norm.training
    Trainer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(4, 4)]).train(0, 1)
    modes = {name: part.training for name, part in net.named_modules()}
    assert modes == {"": True, "frozen": False, "norm": False, "out": True, "drop": True}


class Folded(nn.Linear):
    """Changes with its mode, as layers do that fold weights for inference."""

    folded = False

    def train(self, mode=True):
        self.folded = not mode
        return super().train(mode)


def test_a_train_method_of_the_users_own_is_called():
    layer = Folded(1, 1)
    model = nn.Sequential(layer)
    model.forward = lambda batch: batch.mean() + float(layer.folded)
    loader = EvalLoader(Samples(1), batch_size=1)
    assert evaluate(model, loader, device=CPU) == {"loss": 1.0}
    assert not layer.folded


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_evaluation_is_under_the_autocast_of_training(precision, dtype):
    hooks = {"eval": EvalHook(1, eval_loader=EvalLoader(Points(), batch_size=24))}
    trainer = trained(evaluates=False, hooks=hooks, iters=2, precision=precision)
    assert set(trainer.module.seen) == {(True, dtype), (False, dtype)}


def test_evaluation_has_the_memory_format_of_training():
    class Images(Points):
        def __getitem__(self, index):
            return self.x[index].reshape(1, 2, 2).repeat(3, 1, 1)

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.formats = []

        def forward(self, x):
            is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            self.formats.append((self.training, is_last))
            return self.conv(x).mean()

    net = Seen()
    hook = EvalHook(eval_loader=EvalLoader(Images(), batch_size=6))
    data = TrainLoader(Images(), batch_size=6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Trainer(net, optimizer, data, hooks=[hook], channels_last=True).train(0, 1)
    assert set(net.formats) == {(True, True), (False, True)}


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_with_evaluation_or_without_training_is_the_same(world_size):
    def weights(rank):
        with_it, without = (
            trained(rank, world_size, evaluates=e, draws=True, hooks={"state": Draws()})
            for e in (True, False)
        )
        del with_it.module.norm, without.module.norm  # PreciseBN is to change its statistics
        drawn = [t.hooks["state"].drawn for t in (with_it, without)]
        return drawn[0] == drawn[1] and len(drawn[0]) == 4

    assert run_ranks(weights, world_size) == [True] * world_size


class Draws(HookBase):
    """Notes what the generators give, behind an evaluation."""

    order = 85

    def __init__(self):
        self.drawn = []

    def after_step(self):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))


def local_norm(rank, folder):
    """Train with statistics of each rank's own; return what was logged, and those of this rank."""
    store = InlineStore(folder)
    hooks = {
        "checkpoint": PeriodicCheckpointer(checkpoints=store),
        "best": BestCheckpointer("eval/value", checkpoints=store),
        "eval": EvalHook(
            2, eval_loader=EvalLoader(Points(), batch_size=5, rank=rank, world_size=2)
        ),
    }
    trainer = trained(
        rank,
        2,
        evaluates=False,
        draws=False,
        hooks=hooks,
        strategy=DDP({"broadcast_buffers": False}),
    )
    return trainer.storage.history("eval/value").latest(), trainer.module.norm.running_mean.tolist()


@pytest.mark.ranks
def test_what_is_logged_is_what_the_checkpoint_gives(tmp_path):
    (logged, mean), (also, other_mean) = run_ranks(local_norm, 2, tmp_path)
    assert logged == also
    assert mean != other_mean, "each rank has its own again"
    net = Net().eval()
    net.load_state_dict(CheckpointStore(tmp_path).load(4)["model"])
    assert identical(net.norm.running_mean, torch.tensor(mean))
    with torch.no_grad():
        assert logged == pytest.approx(net.values(Points().x).double().mean().item(), rel=1e-6)


class Broken(Net):
    """Has a mistake in `metrics`, or none, and notes how it was called."""

    def __init__(self, mistake=None):
        super().__init__()
        self.mistake = mistake
        self.register_buffer("table", torch.arange(4.0).expand(3, 4))
        self.num_calls = 0

    def metrics(self, x):
        if self.mistake == "typo":
            return {"value": self.values(xx)}  # noqa: F821
        self.num_calls += 1
        self.cache = x
        self.norm.running_mean += 1
        get_event_storage().put_scalar("inside", 1.0)
        values = self.values(x)
        return {"value": values.mean() if self.mistake == "mean" else values}


class Noting(nn.Module):
    """Puts the mean of its batch; in an evaluation also another value and an image."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        storage = get_event_storage()
        storage.put_scalar("mean", x.mean())
        if not self.training:
            storage.put_scalar("rare", 1.0)
            storage.put_image("seen", torch.zeros(2, 2))
        return self.w * x.mean()


@pytest.mark.parametrize("at_start", [False, True])
def test_scalars_of_an_evaluation_replace_none_of_training(at_start, caplog):
    model = Noting()
    loader = EvalLoader(Points(8), batch_size=4)
    hook = EvalHook(2, eval_loader=loader, at_start=at_start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, [torch.full((2, 4), 3.0)], hooks=[hook])
    trainer.train(0, 4)
    assert trainer.storage.history("mean").values() == [(3.0, i) for i in range(4)]
    assert "rare" not in trainer.storage.histories()
    assert caplog.text.count("are left out: rare; return them from the model's metrics") == 1
    assert [at for _, _, at in trainer.storage.vis_data()] == [0] * 2 * at_start + [1, 1, 3, 3]


class Reading(Noting):
    def forward(self, x):
        storage = get_event_storage()
        if not self.training and "loss" in storage.histories():  # not so before the first step
            self.seen = storage.history("loss").latest(), storage.latest(), storage.put_now("mean")
        return super().forward(x)


def test_an_evaluation_may_read_the_scalars_of_training():
    model = Reading()
    hook = EvalHook(4, eval_loader=EvalLoader(Points(8), batch_size=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Trainer(model, optimizer, [torch.full((2, 4), 3.0)], hooks=[hook], window=2).train(0, 5)
    loss, latest, mean = model.seen
    assert (loss, latest["loss"], latest["mean"], mean) == (3.0, 3.0, 3.0, 3.0)


class Stopping(Noting):
    def forward(self, x):
        get_event_storage().early_stop = not self.training
        return super().forward(x)


def test_an_evaluation_may_end_training_early():
    model = Stopping()
    hook = EvalHook(2, eval_loader=EvalLoader(Points(8), batch_size=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, [torch.ones(2, 4)], hooks=[hook])
    trainer.train(0, 100)
    assert trainer.iter_done < 100


class Order(HookBase):
    """Notes which samples were loaded before each step."""

    def __init__(self, data):
        self.data = data
        self.loaded = []

    def before_step(self):
        self.loaded.append([*self.data.loaded])
        module = self.trainer.module
        self.traces = (module.num_calls, hasattr(module, "cache"), module.norm.running_mean.sum())
        self.draws = random.random(), np.random.rand(), torch.rand(()).item()
        self.names = {*self.trainer.storage.kinds}


class Counted(Points):
    def __init__(self, num=24):
        super().__init__(num)
        self.loaded = []

    def __getitem__(self, index):
        self.loaded.append(index)
        return super().__getitem__(index)


def begun(mistake=None):
    """Train one iteration of a model that may have a mistake; return model and notes."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    net, data = Broken(mistake), Counted()
    order = Order(data)
    hooks = [EvalHook(eval_loader=EvalLoader(data, batch_size=5)), order]
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), lr=0.1), [Points().x], hooks=hooks)
    torch.manual_seed(5)
    try:
        trainer.train(0, 1)
    except Exception as error:
        return net, order, error
    return net, order, None


@pytest.mark.parametrize(
    ("mistake", "kind", "words"),
    [
        ("typo", NameError, "'xx' is not defined"),
        ("mean", ConfigError, r"'value' is \[\]: expected"),
    ],
)
def test_a_mistake_in_metrics_is_found_before_the_first_step(mistake, kind, words):
    net, order, error = begun(mistake)
    assert isinstance(error, kind)
    assert re.search(words, str(error))
    assert order.loaded == []
    assert not any(is_training for is_training, _ in net.seen), "nothing is trained"


def test_one_batch_is_evaluated_before_the_first_step_without_a_trace():
    net, order, error = begun()
    assert error is None
    assert order.loaded == [[0, 1, 2, 3, 4]]
    assert order.traces == (0, False, 0.0)
    assert order.names == set()
    random.seed(3), np.random.seed(3), torch.manual_seed(5)
    assert order.draws == (random.random(), np.random.rand(), torch.rand(()).item())
    assert net.num_calls == 5  # of the final evaluation: 24 samples in batches of 5


def test_loader_processes_load_the_first_batch_only(tmp_path):
    class Noted(Points):
        def __getitem__(self, index):
            (tmp_path / str(index)).touch()
            return super().__getitem__(index)

    loader = EvalLoader(Noted(), batch_size=2, workers=2)
    assert [len(batch) for batch in loader.batches(1)] == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def first_names(rank):
    hook = EvalHook(eval_loader=EvalLoader(Samples(2), batch_size=1, rank=rank, world_size=3))
    trained(rank, 3, evaluates=False, hooks={"eval": hook, "ema": EMA(0.5)}, iters=0)
    return hook.names()


@pytest.mark.ranks
def test_a_rank_without_a_batch_has_the_names_too(monkeypatch):
    monkeypatch.setattr(Net, "metrics", lambda self, x: {"value": x})
    assert run_ranks(first_names, 3) == [["eval/value", "eval_ema/value"]] * 3
