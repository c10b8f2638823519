"""Metrics over a whole set, on ranks, against torchmetrics in one process and plain formulas."""

import random

import numpy as np
import pytest
import torch
import torchmetrics
from ranks import run_ranks
from torch import nn
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score, BinaryPrecision

from distrain import Trainer
from distrain.data.loader import EvalLoader, TrainLoader
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError
from distrain.hooks import EvalHook
from distrain.trainer.evaluate import evaluate
from distrain.trainer.set_metrics import check_metrics

CPU = torch.device("cpu")
SIZES = {"clean": 1003, "noisy": 50, "tiny": 2}


class Scores(torch.utils.data.Dataset):
    """Pairs of a score and a label that is more often 1 where the score is high."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(size)
        self.scores = torch.rand(size, generator=generator)
        self.labels = (torch.rand(size, generator=generator) < self.scores).long()

    def __len__(self):
        return len(self.scores)

    def __getitem__(self, index):
        return self.scores[index], self.labels[index]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, scores, labels):
        return (self.weight * scores - labels).square().mean()

    def metrics(self, scores, labels):
        return {"is_high": (scores > 0.5).float()}

    def predict(self, scores, labels):
        boxes = [torch.full((1 + int(9 * score), 4), float(score)) for score in scores]
        return {"preds": scores, "target": labels, "boxes": boxes}


class Boxes(torchmetrics.Metric):
    """As a mean average precision keeps its boxes: a list with one tensor per image."""

    def __init__(self):
        super().__init__()
        self.add_state("boxes", default=[], dist_reduce_fx=None)

    def update(self, boxes):
        self.boxes.extend(boxes)

    def compute(self):
        weights = torch.arange(1.0, 1 + len(self.boxes))
        sums = torch.stack([each.sum() for each in self.boxes])
        return {"map": (weights * sums).mean(), "num": len(self.boxes), "classes": torch.arange(3)}


def auc(preds, target):
    """The area under the curve by the ranks of the scores (Mann & Whitney 1947)."""
    rank = torch.empty_like(preds)
    rank[preds.argsort()] = torch.arange(1.0, 1 + len(preds))
    ones = target.sum()
    return (rank[target == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(target) - ones))


def num_corners(boxes):
    random.random(), np.random.rand(), torch.rand(())
    return {"boxes": sum(map(len, boxes)), "images": len(boxes)}


def metrics():
    return {
        "auroc": BinaryAUROC(),
        "pair": torchmetrics.MetricCollection([BinaryAccuracy(), BinaryPrecision()]),
        "f1": BinaryF1Score(),
        "found": Boxes(),
        "auc": auc,
        "corners": num_corners,
    }


def expected(size):
    """Return the values of one process that takes all samples at once."""
    data = Scores(size)
    found = Model().predict(data.scores, data.labels)
    pair = {"preds": found["preds"], "target": found["target"]}
    values = {"is_high": float((data.scores > 0.5).double().mean()), "auc": float(auc(**pair))}
    for name, metric in metrics().items():
        if isinstance(metric, BinaryAUROC | BinaryF1Score):
            values[name] = float(metric(**pair))
    counts = num_corners(found["boxes"])
    values |= {f"corners/{name}": float(value) for name, value in counts.items()}
    boxes = Boxes()(found["boxes"])
    values |= {f"found/{name}": float(boxes[name]) for name in ("map", "num")}
    pairs = torchmetrics.MetricCollection([BinaryAccuracy(), BinaryPrecision()])(**pair)
    return values | {f"pair/{name}": float(value) for name, value in pairs.items()}


def trained(rank):
    """Evaluate three sets at the end of training; return what was put, and draws after it."""
    ranks = topology()
    share = {"rank": rank, "world_size": ranks.world_size}
    loaders = {n: EvalLoader(Scores(s), batch_size=64, **share) for n, s in SIZES.items()}
    hook = EvalHook(2, eval_loader=loaders, metrics=metrics())
    model = Model()
    data = TrainLoader(Scores(64), batch_size=16, **share)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), data, hooks=[hook])
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    trainer.train(0, 4)
    draws = torch.rand(()).item(), random.random(), np.random.rand()
    state = trainer.state_dict()["hooks"]["EvalHook"]
    history = {n: h.latest() for n, h in trainer.storage.histories().items() if "eval" in n}
    return history, draws, state


@pytest.mark.ranks
def test_four_ranks_give_the_values_of_one_process():
    wanted = {
        f"eval/{of_set}/{name}": value
        for of_set, size in SIZES.items()
        for name, value in expected(size).items()
    }
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    draws = torch.rand(()).item(), random.random(), np.random.rand()
    for history, drawn, state in run_ranks(trained, 4):
        assert history == pytest.approx(wanted, rel=1e-12, nan_ok=True)
        assert drawn == draws, "a metric that draws leaves the generators alone"
        assert state == {"turns": {name: {"last_done": 4} for name in SIZES}}


def evaluated(rank, given, model=None, size=10, max_batches=None):
    loader = EvalLoader(Scores(size), batch_size=4, rank=rank, world_size=topology().world_size)
    model = model or Model()
    return evaluate(model, loader, device=CPU, metrics=given, max_batches=max_batches)


class Pair(Model):
    def predict(self, scores, labels):
        return scores, labels


def test_a_pair_is_passed_by_position():
    values = evaluated(0, {"auroc": BinaryAUROC(), "auc": lambda p, t: auc(p, t)}, Pair())
    assert values["auroc"] == values["auc"] == expected(10)["auc"]


class One(Model):
    def predict(self, scores, labels):
        return [float(score) for score in scores]


@pytest.mark.ranks
def test_one_value_per_sample_is_the_only_argument():
    scores = [float(score) for score in Scores(10).scores]

    def first_and_last(found):
        assert found == scores, "all, in order"
        return found[-1] - found[0]

    for values in run_ranks(evaluated, 3, {"range": first_and_last}, One()):
        assert values["range"] == scores[-1] - scores[0]


class Stateless(torchmetrics.Metric):
    def update(self, preds): ...

    def compute(self): ...


class Foreign:
    def update(self, preds): ...

    def compute(self): ...


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (Stateless(), "eval.metrics.m: Stateless has no states to gather over ranks"),
        (Foreign(), "eval.metrics.m: Foreign cannot be gathered over ranks; expected an object"),
        (BinaryAUROC, "eval.metrics.m: BinaryAUROC cannot be gathered"),
    ],
)
def test_what_cannot_be_gathered_is_refused(metric, text):
    with pytest.raises(ConfigError, match=text):
        check_metrics({"m": metric})


class Short(Model):
    def predict(self, scores, labels):
        return {"preds": scores[:1]}


@pytest.mark.parametrize(
    ("given", "model", "text"),
    [
        ({"m": auc}, nn.Identity(), "eval.metrics: Identity has no method predict"),
        ({"m": lambda logits: 0}, None, "takes logits, but predict.. returned 'preds', 'target', "),
        ({"m": lambda preds: preds}, None, r"eval.metrics.m: its value is \[10\]; expected one"),
        ({"is_high": auc}, None, "eval.metrics.is_high: the model has a metric of that name"),
        ({"m": lambda preds: 0}, Short(), r"'preds': \[1\]; expected \[4, ...\], or a list"),
    ],
)
def test_mistakes_are_one_line(given, model, text):
    with pytest.raises(ConfigError, match=text) as caught:
        evaluated(0, given, model)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_a_class_that_is_missing_in_a_part_is_no_warning():
    assert evaluated(0, {"auroc": BinaryAUROC()}, size=1, max_batches=1)["auroc"] == 0


def failed(rank, given, max_batches):
    try:
        return evaluated(rank, given, max_batches=max_batches)
    except Exception as error:
        return type(error), str(error)


def needs_ten(preds):
    if len(preds) < 10:
        raise ValueError("fewer than 10 samples")
    raise KeyError("all")


@pytest.mark.ranks
def test_a_metric_that_fails_fails_on_all_ranks_but_not_in_the_dry_run(caplog):
    first, other = run_ranks(failed, 2, {"m": needs_ten}, None)
    assert first == (KeyError, "'all'")
    assert other == (RuntimeError, "'all'")
    assert "m" not in failed(0, {"m": needs_ten}, 1)
    assert "eval.metrics.m: failed on a part of the samples: fewer than 10 samples" in caplog.text
