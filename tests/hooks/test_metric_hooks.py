"""BestCheckpointer and EarlyStopping: which value counts, where it comes from, what is kept."""

import json

import pytest
import torch
from checkpoint_cases import InlineStore, best_of, iterations_in
from ranks import run_ranks
from run_module import run_module

from distrain import HookBase, Trainer, TrainerBase
from distrain.checkpoint.store import CheckpointStore
from distrain.data.loader import EvalLoader
from distrain.errors import ConfigError
from distrain.hooks import (
    EMA,
    BestCheckpointer,
    EarlyStopping,
    EvalHook,
    PeriodicCheckpointer,
    PeriodicWriter,
)


class Steps(TrainerBase):
    def run_step(self):
        self.storage.put_scalar("square", float(self.iter**2))


class Put(HookBase):
    """A hook of a user, which works out a metric by itself."""

    def __init__(self, values, *, at_end=None):
        self.values, self.at_end = values, at_end

    def after_step(self):
        if self.trainer.iter_done in self.values:
            self.trainer.storage.put_scalar("mine", self.values[self.trainer.iter_done])

    def after_train(self):
        if self.at_end is not None:
            self.trainer.storage.put_scalar("mine", self.at_end)


def scores(*values, names=("score",)):
    """Return a function for EvalHook: its n-th call gives the n-th value of each name."""
    calls = iter(values)

    def evaluate():
        value = next(calls)
        return dict(zip(names, value if isinstance(value, tuple) else (value,), strict=True))

    return evaluate


def train(folder, *, iters=30, keep_last=1, period=None, metrics=("eval/score",), **hooks):
    """Train with a writer, which drains the storage before the best checkpoint is looked for."""
    store = InlineStore(folder / "checkpoints", keep_last=keep_last)
    best = {f"best_{m}": BestCheckpointer(m, checkpoints=store) for m in metrics}
    trainer = Steps(
        {
            "writer": PeriodicWriter(run_dir=str(folder)),
            "checkpoint": PeriodicCheckpointer(period, checkpoints=store),
            **best,
            **hooks,
        },
        window=10,
    )
    trainer.train(0, iters)
    return store


def test_the_final_evaluation_counts(tmp_path):
    store = train(tmp_path, eval=EvalHook(10, function=scores(0.5, 0.4, 0.9)))
    assert best_of(store) == {"eval/score": (30, 0.9)}
    assert iterations_in(store.folder) == [30]


def test_a_final_evaluation_that_is_worse_does_not(tmp_path):
    store = train(tmp_path, eval=EvalHook(10, function=scores(0.5, 0.8, 0.7)))
    assert best_of(store) == {"eval/score": (20, 0.8)}
    assert iterations_in(store.folder) == [20, 30]


@pytest.mark.parametrize(
    ("values", "at_end", "expected"),
    [({10: 0.1, 20: 0.3, 25: 0.2}, None, (20, 0.3)), ({10: 0.1, 30: 0.3}, None, (30, 0.3))]
    + [({10: 0.1}, 0.3, (30, 0.3))],
)
def test_a_metric_may_be_a_scalar_that_a_hook_puts(tmp_path, values, at_end, expected):
    store = train(tmp_path, metrics=["mine"], put=Put(values, at_end=at_end))
    assert best_of(store) == {"mine": expected}


def test_the_last_row_is_one_though_a_metric_of_a_hook_is_saved_before(tmp_path):
    evaluation = EvalHook(10, function=scores(0.5, 0.4, 0.9))
    train(tmp_path, metrics=["mine"], eval=evaluation, put=Put({10: 0.1, 30: 0.3}))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row.get("eval/score")) for row in rows] == [
        (9, 0.5),
        (19, 0.4),
        (29, 0.9),
    ]


def test_each_metric_has_its_own_best_and_one_iteration_is_saved_once(tmp_path, monkeypatch):
    saved = []
    real = CheckpointStore.save

    def save(store, iteration, state, **keywords):
        saved.append((iteration, dict(keywords["best"] or {})))
        return real(store, iteration, state, **keywords)

    monkeypatch.setattr(CheckpointStore, "save", save)
    values = (0.5, 1.0), (0.7, 2.0), (0.6, 3.0), (0.6, 2.0)
    evaluation = EvalHook(10, function=scores(*values, names=("score", "other")))
    names = ("eval/score", "eval/other")
    store = train(tmp_path, iters=40, period=1000, metrics=names, eval=evaluation)
    assert best_of(store) == {"eval/score": (20, 0.7), "eval/other": (30, 3.0)}
    assert iterations_in(store.folder) == [20, 30, 40]
    assert saved == [
        (10, {"eval/score": 0.5, "eval/other": 1.0}),
        (20, {"eval/score": 0.7, "eval/other": 2.0}),
        (30, {"eval/other": 3.0}),
        (40, {}),  # before the final evaluation
        (40, {}),
    ]
    state = store.load(30)["hooks"]
    assert (state["best_eval/score"]["best"], state["best_eval/other"]["best"]) == (0.7, 3.0)


def best_by(rank, metric, folder):
    store = CheckpointStore(folder / "checkpoints")
    model = torch.nn.Linear(1, 1)
    data = [torch.full((2, 1), float(rank + 1))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = {"put": PutOwn(), "best": BestCheckpointer(metric, checkpoints=store)}
    Trainer(Mean(model), optimizer, data, hooks=hooks).train(0, 5)
    store.close()
    return None if rank else best_of(store)


class PutOwn(HookBase):
    def after_step(self):
        storage, done = self.trainer.storage, self.trainer.iter_done
        storage.put_scalar("each", -done + self.trainer.where.rank * 10 * done)
        storage.put_scalar("all", float(done))
        storage.put_scalar("close", 1.5 + self.trainer.where.rank * 2**-52)


class Mean(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().mean()


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("loss", r"[\d.]+, [\d.]+"),
        ("each", r"-1\.0, 9\.0"),
        ("close", r"1\.5, 1\.5000000000000002"),
    ],
)
def test_a_value_of_each_rank_is_refused(tmp_path, metric, values):
    with pytest.raises(
        ConfigError,
        match=rf"hooks\.best\.metric={metric}: expected a metric that is eq.* put {values}$",
    ):
        run_ranks(best_by, 2, metric, tmp_path, timeout_s=60)


def test_a_scalar_that_is_equal_on_all_ranks_is_a_metric(tmp_path):
    assert run_ranks(best_by, 2, "all", tmp_path, timeout_s=60)[0] == {"all": (5, 5.0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_the_best(tmp_path, value):
    store = train(tmp_path, eval=EvalHook(10, function=scores(0.5, value, value)))
    assert best_of(store) == {"eval/score": (10, 0.5)}


def test_two_for_one_metric_are_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    hooks = [BestCheckpointer("a", checkpoints=store), BestCheckpointer("a", checkpoints=store)]
    with pytest.raises(
        ConfigError, match=r"hooks\.BestCheckpointer_2\.metric=a: expected a metric"
    ):
        Steps(hooks).train(0, 1)


def test_the_final_evaluation_counts_for_a_stop_of_a_run_that_goes_on(tmp_path):
    stop = EarlyStopping("eval/score", patience=9)
    train(tmp_path, eval=EvalHook(10, function=scores(0.5, 0.4, 0.3)), stop=stop)
    assert stop.state_dict() == {"best": 0.5, "num_bad": 2}


def test_the_demo_keeps_its_last_and_best(tmp_path):
    """The best of the two evaluations is the second."""
    run = tmp_path / "run"
    words = ["+experiment=digits", "launch.ranks=1", "trainer.max_iter=40", "hooks.eval.period=20"]
    result = run_module("distrain", *words, f"run.dir={run}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = {
        line["iteration"] + 1: line["eval/accuracy"] for line in lines if "eval/accuracy" in line
    }
    assert sorted(seen) == [20, 40]
    assert seen[40] > seen[20]
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (best["iteration"], best["metric"]) == (40, seen[40])


class Scored(torch.nn.Module):
    """Has a metric `score`, and `rare` in the last batch only."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return (self.weight * batch).mean()

    def metrics(self, batch):
        return {"score": batch} | ({"rare": batch} if batch.max() >= 5 else {})


class Own(HookBase):
    """A hook of a user, which might put anything."""


def misspelt(metric, *more):
    net = Scored()
    samples = [torch.tensor(float(index)) for index in range(6)]
    stop = EarlyStopping(metric, patience=1)
    loader = EvalLoader(samples, batch_size=2)
    hooks = {"eval": EvalHook(eval_loader=loader), "ema": EMA(), "stop": stop}
    hooks |= {type(hook).__name__: hook for hook in more}
    data = [torch.ones(2)]
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), lr=0.1), data, hooks=hooks)
    trainer.train(0, 1)
    return net.weight.item()


@pytest.mark.parametrize("prefix", ["eval", "eval_ema"])
def test_a_misspelt_metric_of_an_evaluation_is_refused(prefix):
    expected = f"expected a metric of an evaluation; did you mean {prefix}/score"
    words = rf"hooks\.stop\.metric={prefix}/scor: {expected}"
    with pytest.raises(ConfigError, match=words):
        misspelt(f"{prefix}/scor")


@pytest.mark.parametrize("metric", ["eval/score", "eval/rare", "eval_ema/rare"])
def test_a_metric_that_some_batches_have_is_taken(metric, caplog):
    assert misspelt(metric) == pytest.approx(0.9)
    assert not caplog.records


def test_a_metric_that_a_hook_of_the_user_may_put_is_not_refused(caplog):
    assert misspelt("eval/scor", Own()) == pytest.approx(0.9)
    start, end = (record.getMessage() for record in caplog.records)
    assert start.startswith(
        "hooks.stop.metric=eval/scor: expected a metric of an evaluation; did you mean"
    )
    assert end.startswith("hooks.stop.metric=eval/scor: no such scalar was put in 1 iterations;")


def test_any_other_metric_that_nothing_put_is_told_at_the_end(caplog):
    assert misspelt("los") == pytest.approx(0.9)
    (record,) = caplog.records
    words = "no such scalar was put in 1 iterations; available: loss, eval/score, "
    assert words in record.getMessage()


def test_a_misspelt_metric_leaves_no_run(tmp_path):
    words = ["launch.in_process=true", "hooks.best.metric=eval/acuracy", "run.dir=run"]
    result = run_module("distrain", "+experiment=digits", *words, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "did you mean eval/accuracy?" in result.stderr.splitlines()[-1]
    assert not any(tmp_path.iterdir())
