"""EvalHook with several sets: a period per set, the start, a limit, and what decides by names."""

import pytest
import torch
from checkpoint_cases import InlineStore, best_of, identical
from ranks import run_ranks
from torch import nn

from distrain import HookBase, Trainer
from distrain.data.loader import EvalLoader, TrainLoader
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError
from distrain.hooks import EMA, BestCheckpointer, EvalHook, PeriodicCheckpointer


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size=8, offset=0.0):
        self.values = torch.arange(size) + offset

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index].float()


class Model(nn.Module):
    """Its weight is the number of iterations done."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return -self.weight + 0 * x.sum()

    def metrics(self, x):
        return {"value": x + 0 * self.weight, "weight": self.weight.expand(len(x))}

    def predict(self, x):
        return x


def loaders(rank=0, world_size=1):
    share = {"batch_size": 3, "rank": rank, "world_size": world_size}
    sets = {"clean": Numbers(7), "noisy": Numbers(4, offset=10.0)}
    return {name: EvalLoader(data, **share) for name, data in sets.items()}


class Seen(HookBase):
    """Notes which metrics are new in each iteration."""

    order = 85
    names = ("eval/clean/weight", "eval/noisy/weight", "eval_ema/clean/weight")

    def __init__(self):
        self.seen = {}

    def before_train(self):
        self.note()

    def after_step(self):
        self.note()

    def after_train(self):
        self.note()

    def note(self):
        found = {name: self.trainer.metric_now(name) for name in self.names}
        self.seen[self.trainer.iter_done] = {n: v for n, v in found.items() if v is not None}


def train(hooks, iters, *, state=None, rank=0, world_size=1):
    model = Model()
    data = TrainLoader(Numbers(), batch_size=4, rank=rank, world_size=world_size)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), data, hooks=hooks)
    start = 0
    if state is not None:
        trainer.load_state_dict(state)
        start = state["stream"]["iteration"]
    trainer.train(start, iters)
    trainer.reduction.drain(trainer.storage.iter)  # as writers do, for what was put at the end
    return trainer


def test_each_set_has_its_period_and_the_end():
    hook = EvalHook({"clean": 2}, eval_loader=loaders())
    seen = Seen()
    trainer = train({"eval": hook, "seen": seen, "ema": EMA(0.0)}, 5)
    clean, noisy, ema = Seen.names
    both = {clean: 5.0, noisy: 5.0, ema: 5.0}
    assert seen.seen == {
        **{i: {} for i in (0, 1, 3)},
        2: {clean: 2.0, ema: 2.0},
        4: {clean: 4.0, ema: 4.0},
        5: both,
    }
    assert trainer.storage.history("eval/noisy/value").values() == [(11.5, 4)]
    assert hook.names()[:2] == ["eval/clean/value", "eval/clean/weight"]


def test_at_the_start_of_a_new_run_only():
    hook = EvalHook(eval_loader=loaders(), at_start=True)
    seen = Seen()
    trainer = train({"eval": hook, "seen": seen}, 2)
    assert seen.seen[0] == {"eval/clean/weight": 0.0, "eval/noisy/weight": 0.0}
    assert seen.seen[1] == {}, "it is no result of the first iteration"
    values = trainer.storage.history("eval/clean/weight").values()
    assert values == [(0.0, 0), (2.0, 1)]
    hooks = {"eval": EvalHook(eval_loader=loaders(), at_start=True)}
    again = train(hooks, 3, state=trainer.state_dict())
    assert again.storage.history("eval/clean/weight").values() == [*values, (3.0, 2)]


def test_resumed_is_straight():
    def hooks():
        sets = EvalHook({"clean": 2, "noisy": 3}, eval_loader=loaders(), metrics={"max": max_of})
        return {"eval": sets, "ema": EMA(0.5)}

    straight = train(hooks(), 8).state_dict()
    stopped = train({"stop": StopAt(3)} | hooks(), 8)
    resumed = train(hooks(), 8, state=stopped.state_dict()).state_dict()
    assert identical(resumed, straight)


class StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter_done == self.iteration:
            self.trainer.request_stop()


def max_of(x):
    return x.max()


def limited(rank, limit):
    world_size = topology().world_size
    hook = EvalHook(eval_loader=loaders(rank, world_size), metrics={"max": max_of}, limit=limit)
    trainer = train({"eval": hook}, 1, rank=rank, world_size=world_size)
    names = ("clean/max", "clean/value", "noisy/max")
    return [trainer.storage.history(f"eval/{name}").latest() for name in names]


@pytest.mark.ranks
def test_the_limit_is_over_all_ranks():
    assert run_ranks(limited, 2, 5) == [[4.0, 2.0, 13.0]] * 2
    assert run_ranks(limited, 4, 1) == [[0.0, 0.0, 10.0]] * 4


def test_the_best_by_the_metric_of_a_set(tmp_path):
    store = InlineStore(tmp_path)
    values = iter([0, 3, 1, 2, 0])  # the first is that of the check before the first step

    def score(x):
        return next(values)

    noisy = {"noisy": loaders()["noisy"]}
    hooks = {
        "eval": EvalHook({"noisy": 1}, eval_loader=noisy, metrics={"score": score}),
        "checkpoint": PeriodicCheckpointer(checkpoints=store),
        "best": BestCheckpointer("eval/noisy/score", checkpoints=store),
    }
    train(hooks, 4)
    assert best_of(store) == {"eval/noisy/score": (1, 3.0)}


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"period": {"nosy": 1}}, "period.nosy: no such set in data.eval; did you mean noisy?"),
        ({"limit": 0}, "limit=0: expected an integer >= 1"),
        ({"metrics": {"a/b": max_of}}, "eval.metrics.a/b: expected a name without /"),
        ({"metrics": {"a": 1}}, "eval.metrics.a: int cannot be gathered"),
    ],
)
def test_mistakes(keywords, text):
    with pytest.raises(ConfigError, match=text):
        EvalHook(**{"eval_loader": loaders(), **keywords})


def test_an_unknown_metric_is_refused_with_the_nearest(tmp_path):
    store = InlineStore(tmp_path)
    hooks = {
        "eval": EvalHook(eval_loader=loaders(), metrics={"max": max_of}),
        "best": BestCheckpointer("eval/clean/maxx", checkpoints=store),
    }
    with pytest.raises(ConfigError, match="hooks.best.metric=eval/clean/maxx: .*eval/clean/max"):
        train(hooks, 1)
    with pytest.raises(ConfigError, match="metrics: expected an eval_loader"):
        EvalHook(metrics={"max": max_of})
