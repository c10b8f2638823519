"""Models of the shape of Lightning's and Hugging Face's, trained unchanged; the real ones too."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional

from distrain import EventStorage, Trainer
from distrain.adapters import HuggingFaceModel, LightningModel, lightning_hooks
from distrain.config import check_keys
from distrain.errors import ConfigError, ExitCode
from distrain.hooks import EvalHook, LRScheduler
from distrain.job.plan import plan
from distrain.job.training import train
from distrain.trainer.evaluate import evaluate

CPU = torch.device("cpu")


class Points(torch.utils.data.Dataset):
    """x (1,) = 0 ... 7 and y (1,) = 2 x."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.tensor([float(index)])
        return x, 2 * x


class Line(nn.Module):
    """Of a LightningModule's shape: y = w x, from w = 0."""

    def __init__(self, *, scheduler=None, automatic=True):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.seen = []
        self.scheduler = scheduler
        self.automatic_optimization = automatic

    def log(self, name, value, **flags):
        raise AssertionError("the adapter takes its place")

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(batch_idx)
        loss = functional.mse_loss(self.w * x, y)
        self.log("loss", loss, prog_bar=True)
        self.log("largest", x.max(), reduce_fx="max", on_step=True)
        self.log_dict({"w": self.w.detach()}, batch_size=len(x))
        return {"loss": loss, "x": x}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("error", (self.w * x - y).abs().mean(), on_epoch=True)
        self.log("batch", float(batch_idx))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.w], lr=0.01)
        if self.scheduler is None:
            return optimizer
        halves = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halves, **self.scheduler}}


class Batches(list):
    """An evaluation loader: batches of all sizes."""


def points(*indices):
    x = torch.tensor(indices, dtype=torch.float32)[:, None]
    return [x, 2 * x]


def test_a_lightning_module_takes_the_same_steps_as_by_hand():
    line = Line()
    model = LightningModel(line)
    optimizer, schedule = model.configure_optimizers()
    assert schedule is None
    trainer = Trainer(model, optimizer, [points(1), points(2)], window=1)
    trainer.train(0, 2)
    # w = 0: the gradient of (w - 2)**2 is -4, so w = 0.04; of (2 w - 4)**2 then 4 (2 w - 4)
    assert line.w.item() == pytest.approx(0.04 - 0.01 * 4 * (0.08 - 4))
    assert line.seen == [0, 1]
    assert trainer.storage.history("loss").values() == [
        (4.0, 0),
        (pytest.approx((0.08 - 4) ** 2), 1),
    ]
    assert [value for value, _ in trainer.storage.history("largest").values()] == [1.0, 2.0]
    assert trainer.storage.kinds["largest"].reduce == "max"
    assert trainer.storage.history("w").values() == [(0.0, 0), (pytest.approx(0.04), 1)]


def test_what_a_validation_step_logs_is_averaged_over_samples():
    model = LightningModel(Line())
    loader = Batches([points(1, 2, 3), points(6)])
    with EventStorage() as storage:
        found = evaluate(model, loader, device=CPU)
    assert found == {"batch": 0.25, "error": 6.0}  # |2 x|: the means of the batches are 4 and 12
    assert storage.latest() == {}  # nothing of it is a scalar of training
    assert evaluate(model, loader, device=CPU)["batch"] == 0.25  # counted from 0 again


@pytest.mark.parametrize("returns_loss", [True, False])
def test_a_module_that_logs_nothing_when_validating_shows_its_loss(returns_loss):
    line = Line()

    def step(batch, batch_idx):
        return functional.mse_loss(line.w * batch[0], batch[1])

    line.training_step = step
    line.validation_step = step if returns_loss else lambda batch, batch_idx: None
    with EventStorage():
        found = evaluate(LightningModel(line), Batches([points(1), points(2)]), device=CPU)
    assert found == {"loss": 10.0}  # of 4 and 16


def rates(scheduler, num, **keywords):
    """Return the learning rate of each of the first steps."""
    model = LightningModel(Line(scheduler=scheduler), **keywords)
    optimizer, schedule = model.configure_optimizers()
    trainer = Trainer(model, optimizer, [points(0)], hooks=[LRScheduler(schedule)], window=1)
    trainer.train(0, num)
    return [value for value, _ in trainer.storage.history("lr").values()]


def test_schedules_count_steps_or_epochs():
    assert rates({"interval": "step"}, 3) == [0.01, 0.005, 0.0025]
    assert rates({"interval": "step", "frequency": 2}, 4) == [0.01, 0.01, 0.005, 0.005]
    assert rates({}, 5, epoch_iters=2) == [0.01, 0.01, 0.005, 0.005, 0.0025]
    # as Lightning counts: after iterations 2, 5 and 8, the second ones of epochs of three
    of_epochs = rates({"interval": "step", "frequency": 2}, 6, epoch_iters=3)
    assert of_epochs == [0.01, 0.01, 0.005, 0.005, 0.005, 0.0025]


def test_a_schedule_of_epochs_resumes_where_it_was():
    parts = []
    for _ in range(2):
        model = LightningModel(Line(scheduler={}), epoch_iters=3)
        parts.append(model.configure_optimizers())
    (optimizer, first), (other, second) = parts
    for num in range(6):
        if num == 4:  # in the second epoch
            other.load_state_dict(optimizer.state_dict())
            second.load_state_dict(first.state_dict())
        for schedule in (first, second)[: 2 if num >= 4 else 1]:
            schedule.optimizer.step()
            schedule.step()
    assert second.state_dict() == first.state_dict()
    assert first.get_last_lr() == second.get_last_lr() == [0.0025]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LightningModel(nn.Linear(1, 1)), "Linear has no training_step"),
        (
            lambda: LightningModel(Line(automatic=False))(None),
            "automatic_optimization=False: expected step._target_=distrain.adapters",
        ),
        (lambda: LightningModel(Line(), epoch_iters=0), "epoch_iters=0: expected an integer >= 1"),
        (
            lambda: LightningModel(Line(scheduler={})).configure_optimizers(),
            "epoch_iters: expected a value",
        ),
        (
            lambda: LightningModel(Line(scheduler={"interval": "epochs"})).configure_optimizers(),
            "configure_optimizers: interval=epochs: expected one of step, epoch",
        ),
        (
            lambda: LightningModel(Line(scheduler={"intervall": "step"})).configure_optimizers(),
            "configure_optimizers: lr_scheduler has no key 'intervall'; did you mean interval",
        ),
    ],
)
def test_what_cannot_be_followed_is_said(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda a, b: [a, b], "SGD, SGD; expected one optimizer"),
        (lambda a, b: None, "NoneType; expected one optimizer"),
        (
            lambda a, b: {
                "optimizer": a,
                "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(a),
            },
            "ReduceLROnPlateau waits for a metric",
        ),
    ],
)
def test_optimizers_that_cannot_be_followed(given, text):
    line = Line()
    two = [torch.optim.SGD([line.w], lr=0.1) for _ in range(2)]
    line.configure_optimizers = lambda: given(*two)
    with pytest.raises(ConfigError, match=text):
        LightningModel(line).configure_optimizers()


@pytest.mark.parametrize("form", ["alone", "list", "lists"])
def test_all_forms_of_an_optimizer(form):
    line = Line()
    optimizer = torch.optim.SGD([line.w], lr=0.1)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    forms = {"alone": optimizer, "list": [optimizer], "lists": ([optimizer], [steps])}
    line.configure_optimizers = lambda: forms[form]
    found, schedule = LightningModel(line, epoch_iters=1).configure_optimizers()
    assert found is optimizer
    assert (schedule is steps) == (form == "lists")


def test_a_step_without_loss_and_a_strange_operation_are_said():
    line = Line()
    model = LightningModel(line)
    line.training_step = lambda batch, i: None
    with EventStorage(), pytest.raises(ConfigError, match="training_step of Line returned no loss"):
        model(points(1))
    line.training_step = lambda batch, i: line.log("x", 1.0, reduce_fx="median")
    with EventStorage(), pytest.raises(ConfigError, match="reduce_fx='median'; available: mean"):
        model(points(1))


def test_what_is_logged_is_one_number():
    line = Line()
    model = LightningModel(line)
    for value, got in [(object(), "not object"), (torch.ones(2), r"not a tensor of shape \[2\]")]:
        line.training_step = lambda batch, i, value=value: line.log("x", value)
        line.validation_step = line.training_step
        for step in (model, model.metrics):
            with EventStorage(), pytest.raises(ConfigError, match=rf"self.log\('x'\): .*{got}"):
                step(points(1))


def test_an_evaluation_takes_means_only():
    line = Line()
    model = LightningModel(line)
    line.validation_step = lambda batch, i: line.log("hits", 3.0, reduce_fx="sum")
    with pytest.raises(ConfigError, match=r"log\('hits'\): reduce_fx='sum' in validation_step"):
        model.metrics(points(1))


def test_an_evaluation_weights_by_the_logged_batch_size():
    line = Line()

    def validation_step(batch, batch_idx):
        line.log("by_weight", batch[0].mean(), batch_size=int(batch[0][0]))
        line.log("by_samples", batch[0].mean(), batch_size=1)

    line.validation_step = validation_step
    with EventStorage():
        found = evaluate(LightningModel(line), Batches([points(1), points(3)]), device=CPU)
    assert found == {"by_weight": (1 + 9) / 4, "by_samples": 2.0}


def test_a_validation_step_that_asks_for_the_set_gets_one_set():
    line = Line()
    line.validation_step = lambda batch, batch_idx, dataloader_idx=0: line.log("x", 1.0)
    model = LightningModel(line)
    optimizer, _ = model.configure_optimizers()
    sets = {"near": Batches([points(1)]), "far": Batches([points(3)])}
    for given, ends in ((sets["near"], True), (sets, False)):
        trainer = Trainer(model, optimizer, [points(1)], hooks=[EvalHook(1, eval_loader=given)])
        refused = pytest.raises(ConfigError, match="data.eval: near, far: validation_step of Line")
        with contextlib.nullcontext() if ends else refused:
            trainer.train(0, 1)


def test_the_module_learns_of_its_device():
    line = Line()
    line.to = lambda device: setattr(line, "noted", device)
    LightningModel(line).to("meta")
    assert line.noted == torch.device("meta")


class Progress(Line):
    """Notes its progress in every step."""

    def __init__(self, *, epochs=True):
        super().__init__()
        self.epochs = epochs
        self.noted = []

    def note(self, kind):
        found = [kind, self.global_step, self.trainer.global_step]
        if self.epochs:
            found += [self.current_epoch, self.trainer.current_epoch]
        self.noted.append(tuple(found))

    def training_step(self, batch, batch_idx):
        self.note("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch):
        self.note("eval")
        return functional.mse_loss(self.w * batch[0], batch[1])


def test_steps_and_epochs_advance_and_go_on_when_resumed():
    line = Progress()
    model = LightningModel(line, epoch_iters=2)
    assert (line.global_step, line.current_epoch) == (0, 0)
    optimizer, _ = model.configure_optimizers()
    hook = EvalHook(period=2, eval_loader=Batches([points(1)]))
    trainer = Trainer(model, optimizer, Batches([points(1)] * 8), hooks=[hook], window=1)
    trainer.train(0, 3)
    train = [(0, 0, 0, 0), (1, 1, 0, 0), (2, 2, 1, 1)]
    assert [n[1:] for n in dict.fromkeys(line.noted) if n[0] == "train"] == train
    assert [n[1:] for n in dict.fromkeys(line.noted) if n[0] == "eval"][-2:] == [
        (2, 2, 1, 1),
        (3, 3, 1, 1),
    ]
    line.noted.clear()
    Trainer(model, optimizer, Batches([points(1)] * 8), window=1).train(6, 8)
    assert {n[1:] for n in line.noted} == {(6, 6, 3, 3), (7, 7, 3, 3)}


def test_what_of_the_trainer_is_not_there_is_said():
    line = Progress(epochs=False)
    model = LightningModel(line)
    with pytest.raises(ConfigError, match="epoch_iters: expected a value, as the module reads cur"):
        line.trainer.current_epoch  # noqa: B018
    with pytest.raises(ConfigError, match=r"self.trainer.datamodule does not exist here; availab"):
        line.trainer.datamodule  # noqa: B018
    assert getattr(line.trainer, "datamodule", None) is None
    place = line.trainer
    assert (place.global_rank, place.world_size, place.is_global_zero) == (0, 1, True)
    assert not any("trainer" in name for name in model.state_dict())


HOOKS = [
    "on_fit_start",
    "on_fit_end",
    "on_train_start",
    "on_train_end",
    "on_validation_start",
    "on_validation_end",
    "on_test_start",
    "on_test_end",
    "on_predict_start",
    "on_predict_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "on_validation_model_zero_grad",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_test_model_eval",
    "on_test_model_train",
    "on_predict_model_eval",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_predict_epoch_start",
    "on_predict_epoch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_sharded_model",
    "configure_model",
    "prepare_data",
    "setup",
    "teardown",
    "train_dataloader",
    "test_dataloader",
    "val_dataloader",
    "predict_dataloader",
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_load_checkpoint",
    "on_save_checkpoint",
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "configure_callbacks",
    "configure_optimizers",
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
]  # of Lightning 2.6
HOOKS += [
    "training_epoch_end",
    "validation_epoch_end",
    "training_step_end",
    "validation_step_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_batch_start",
    "on_batch_end",
]  # of Lightning 1


def test_every_hook_is_called_replaced_or_refused():
    assert sorted(lightning_hooks.table()) == sorted(HOOKS)
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    for name, becomes in lightning_hooks.table().items():
        assert any(f"`{name}`" in line and becomes in line for line in page.splitlines()), name


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_is_overridden_is_called_or_refused_by_name(name):
    called = []
    kind = type("Own", (Line,), {name: lambda self, *a: called.append(a)})
    if name not in lightning_hooks.REFUSED:
        LightningModel(kind())
        assert called == {"setup": [("fit",)], "configure_model": [()]}.get(name, [])
        return
    with pytest.raises(ConfigError, match=f"module: Own overrides {name}, which is not called; "):
        LightningModel(kind())


def test_a_hook_of_the_library_itself_is_not_the_modules(monkeypatch):
    library = type("LightningModule", (Line,), {name: lambda self, *a: None for name in HOOKS})
    library.on_something_new = library.on_gpu = lambda self: None
    library.__module__ = "lightning.pytorch.core.module"
    LightningModel(library())
    late = type("Own", (library,), {"on_something_new": lambda self: None})
    with pytest.raises(ConfigError, match="Own overrides on_something_new, which is not called"):
        LightningModel(late())


@pytest.mark.parametrize("name", ["log", "manual_backward"])
def test_a_method_that_the_adapter_replaces_is_not_overridden(name):
    library = type("LightningModule", (Line,), {name: lambda self, *a: None})
    library.__module__ = "lightning.pytorch.core.module"
    module = library()
    for _ in range(2):  # the adapter's own methods are not the module's
        LightningModel(module)
    own = type("Own", (library,), {name: lambda self, *a: None})
    with pytest.raises(ConfigError, match=f"module: Own overrides {name}, which the adapter repl"):
        LightningModel(own())


def test_a_batch_is_changed_on_its_device_before_each_step():
    line = Line()
    line.on_after_batch_transfer = lambda batch, dataloader_idx: [batch[0] + 1, batch[1]]
    model = LightningModel(line)
    with EventStorage():
        assert model(points(1)).item() == 4.0  # w is 0
    line.on_after_batch_transfer = lambda batch, dataloader_idx: [batch[0], batch[1] * 2]
    with EventStorage():
        assert model(points(1)).item() == 16.0


# over ranks

SHARES = (points(1), points(2, 3, 4))


def over_ranks(rank, *, kind):
    """Take a step with this rank's share; return the weight and what was put."""
    x, y = SHARES[rank]
    if kind == "lightning":
        model, batch = LightningModel(Line()), [x, y]
    else:
        model, batch = HuggingFaceModel(LineForHF()), {"inputs": x, "labels": y}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, [batch], window=1)
    trainer.train(0, 1)
    put = {name: history.latest() for name, history in trainer.storage.histories().items()}
    return next(model.parameters()).item(), put


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["lightning", "hugging face"])
def test_two_ranks_take_the_mean_of_their_gradients(kind):
    # at w = 0 the gradient is -4 mean(x**2): -4 and -4 * 29 / 3; the losses are as large
    gradient = -4 * (1 + 29 / 3) / 2
    for weight, put in run_ranks(over_ranks, 2, kind=kind):
        assert weight == pytest.approx(-0.01 * gradient)
        assert put["loss"] == pytest.approx(-gradient)
        if kind == "lightning":
            assert put["largest"] == 4.0  # of both ranks, by reduce_fx
            assert put["w"] == 0.0


# Hugging Face


@dataclass
class Output:
    """Of a ModelOutput's shape."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class LineForHF(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, inputs=None, labels=None):
        logits = self.w * inputs
        loss = None if labels is None else functional.mse_loss(logits, labels)
        return Output(loss, logits)


def test_a_hugging_face_model_takes_the_same_steps_as_by_hand():
    line = LineForHF()
    model = HuggingFaceModel(line)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = points(1)
    trainer = Trainer(model, optimizer, [{"inputs": x, "labels": y}], window=1)
    trainer.train(0, 1)
    assert line.w.item() == pytest.approx(0.04)
    assert trainer.storage.history("loss").values() == [(4.0, 0)]
    x, y = points(3, 4)
    with torch.no_grad():
        line.w.zero_()
    loader = Batches([{"inputs": x, "labels": y}])
    assert evaluate(model, loader, device=CPU) == {"loss": (36 + 64) / 2}


class Predicts(Line):
    def predict_step(self, batch, batch_idx):
        x, y = batch
        return {"preds": self.w * x, "target": y}


def largest_error(preds, target):
    return (preds - target).abs().max()


def test_predictions_of_both_kinds_are_for_metrics_over_a_whole_set():
    x, y = points(3, 4)
    parts = [points(3), points(4)]
    given = {"largest_error": largest_error}
    for model, batches in (
        (LightningModel(Predicts()), Batches(parts)),
        (HuggingFaceModel(LineForHF()), Batches({"inputs": x, "labels": y} for x, y in parts)),
    ):
        values = evaluate(model, batches, device=CPU, metrics=given)
        assert values["largest_error"] == y.abs().max()
    with pytest.raises(ConfigError, match="module: Line has no predict_step for predictions"):
        evaluate(LightningModel(Line()), Batches(parts), device=CPU, metrics=given)


def test_a_batch_without_labels_or_names_is_said():
    model = HuggingFaceModel(LineForHF())
    with pytest.raises(ConfigError, match="LineForHF returned no loss for the keys inputs; add"):
        model({"inputs": torch.ones(1)})
    with pytest.raises(ConfigError, match="a batch is a list; a Hugging Face model takes a dict"):
        model([torch.ones(1)])


# by configuration: the model brings optimizer and schedule


def conf_of(model, **keys):
    """Return a resolved configuration for a model, with keys of its own."""
    data = {"_target_": f"{__name__}.Points"}
    conf = {
        "run": {"name": "x", "dir": "x"},
        "data": {"batch_size": 4, "train": data, "eval": data},
        "trainer": {"max_iter": 4, "window": 1},
        "model": model,
        "optim": None,
        "schedule": None,
        "launch": {"_target_": "x.Y"},
        "checkpoint": {},
        "hooks": {
            "schedule": {"_target_": "distrain.hooks.LRScheduler"},
            "eval": {"_target_": "distrain.hooks.EvalHook"},
            "checkpoint": {"_target_": "distrain.hooks.PeriodicCheckpointer", "period": 3},
            "writer": {"_target_": "distrain.hooks.PeriodicWriter"},
        },
    }
    return check_keys.check(conf | keys)


def lightning_node(module="Line", **keywords):
    target = module if "." in module else f"{__name__}.{module}"
    return {
        "_target_": "distrain.adapters.LightningModel",
        "epoch_iters": 2,
        "module": {"_target_": target, **keywords},
    }


@pytest.fixture
def one_rank(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_configuration_without_optim_takes_the_models_own(tmp_path, one_rank):
    conf = conf_of(lightning_node(scheduler={}))
    assert train(conf, str(tmp_path)) == ExitCode.FINISHED
    found = rows(tmp_path)
    assert (found[0]["lr"], found[-1]["lr"]) == (0.01, 0.005)
    assert set(found[-1]) >= {"loss", "largest", "w", "eval/error"}
    longer = conf | {"trainer": conf["trainer"] | {"max_iter": 6}}
    assert train(longer, str(tmp_path)) == ExitCode.FINISHED  # from the checkpoint
    assert rows(tmp_path)[-1]["lr"] == 0.0025


def test_the_plan_names_who_made_the_groups(tmp_path):
    text = plan(conf_of(lightning_node(scheduler={})), str(tmp_path))
    assert "SGD, 1 groups" in text
    assert text.count("by its configure_optimizers") == 2


def test_mistakes_with_own_optimizers(tmp_path, one_rank):
    constant = {"_target_": "distrain.schedule.WarmupConstantLR"}
    both = conf_of(lightning_node(scheduler={}), schedule=constant)
    with pytest.raises(ConfigError, match="add {override /schedule: null}"):
        train(both, str(tmp_path))
    none = conf_of({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1})
    with pytest.raises(ConfigError, match="optim=null: Linear has no configure_optimizers"):
        train(none, str(tmp_path))


# the real ones, where they are installed


class Tokens(torch.utils.data.Dataset):
    """One sentence of 6 tokens, again and again."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.tensor([1, 2, 3, 4, 5, 6])
        return {"input_ids": tokens, "labels": tokens}


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config)


def test_a_real_transformer(tmp_path, one_rank):
    pytest.importorskip("transformers")
    node = {"_target_": "distrain.adapters.HuggingFaceModel"}
    data = {"_target_": f"{__name__}.Tokens"}
    conf = conf_of(
        node | {"model": {"_target_": f"{__name__}.tiny_gpt2"}},
        optim={"target": "torch.optim.AdamW", "lr": 0.01},
        data={"batch_size": 4, "train": data, "eval": data},
        trainer={"max_iter": 40, "window": 1},
    )
    assert train(conf, str(tmp_path)) == ExitCode.FINISHED
    found = rows(tmp_path)
    assert found[0]["loss"] > 1.5 > 0.3 > found[-1]["eval/loss"]


def real_module():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(self.layer.weight)

        def training_step(self, batch, batch_idx):
            loss = functional.mse_loss(self.layer(batch[0]), batch[1].to(self.device))
            self.log("train_loss", loss, prog_bar=True, sync_dist=True)
            self.log_dict({"weight": self.layer.weight.mean()})
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", functional.mse_loss(self.layer(batch[0]), batch[1]))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    return Module()


def test_a_real_lightning_module(tmp_path, one_rank, monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # lightning sets it at its import
    pytest.importorskip("lightning")
    conf = conf_of(lightning_node("real_module"))
    assert train(conf, str(tmp_path)) == ExitCode.FINISHED
    found = rows(tmp_path)
    assert (found[0]["lr"], found[-1]["lr"]) == (0.01, 0.005)
    assert set(found[-1]) >= {"loss", "train_loss", "weight", "eval/val_loss"}
    assert found[-1]["eval/val_loss"] < found[0]["train_loss"] / 4
