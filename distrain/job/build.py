"""Build the objects that a configuration names: optimizer, schedule, data, hooks, trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrain.checkpoint.store import CheckpointStore
from distrain.checks import wrong
from distrain.config.import_path import locate
from distrain.config.instantiate import build, with_key
from distrain.data.loader import EvalLoader, TrainLoader
from distrain.data.samplers import SampleOrder
from distrain.data.stream import micro_batches
from distrain.distributed.ranks import Topology, local_device
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError
from distrain.job.same_data import check_same_data, open_files
from distrain.job.strategy import STRATEGY_KEYS
from distrain.optim.optimizer import build_optimizer
from distrain.schedule.schedules import WarmupConstantLR
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Seekable, Trainer

Conf = dict[str, Any]

NOT_OF_TRAINER = (
    *("max_iter", "deterministic", "float32_matmul", "sync_batchnorm"),
    *STRATEGY_KEYS,
)
"""Keys of `trainer` that are used before the Trainer exists."""


@dataclass(frozen=True)
class Parts:
    """The objects of a run. `loader` is a `distrain.data.Loader` or another source of batches."""

    trainer: Trainer
    loader: Any
    schedule: Any


def build_parts(
    conf: Conf,
    *,
    model: nn.Module,
    strategy: Strategy,
    ranks: Topology,
    run_dir: str,
    checkpoints: CheckpointStore,
    largest_forward: int | None = None,
) -> Parts:
    """Build everything but the model, in the order optimizer, schedule, data, hooks, trainer.

    Hooks get `eval_loader`, `schedule`, `checkpoints`, `run_dir` or `conf` if they have a keyword
    of that name.

    Args:
        conf: resolved configuration.
        model: as `build_model` returned it.
        strategy: as `build_strategy` returned it.
        ranks: position of this process.
        run_dir: folder of the run.
        checkpoints: of the run.
        largest_forward: most samples per forward, those of a resumed checkpoint; None: no limit.

    Raises:
        ConfigError: a part cannot be built; names its key.
    """
    settings = {k: v for k, v in conf["trainer"].items() if k not in NOT_OF_TRAINER}
    optimizer, schedule = _optimization(conf, model)
    data_ranks = strategy.data_ranks(ranks)
    settings["accumulation"] = micro_batches(
        conf["data"]["batch_size"],
        ranks=data_ranks.world_size,
        accumulation=settings["accumulation"],
        largest=largest_forward,
    )
    train_set, eval_set = _build_datasets(conf, ranks)
    loader = _train_loader(conf, data_ranks, train_set, accumulation=settings["accumulation"])
    hooks = _build_hooks(
        eval_loader=None if eval_set is None else eval_loader(conf, data_ranks, eval_set),
        schedule=schedule,
        checkpoints=checkpoints,
        run_dir=run_dir,
        conf=conf,
    )
    trainer = Trainer(model, optimizer, loader, hooks=hooks, strategy=strategy, **settings)
    return Parts(trainer, loader, schedule)


def _optimization(conf: Conf, model: nn.Module) -> tuple[Optimizer, Any]:
    """Return the configured optimizer and schedule; with optim=null those of the model."""
    own = None
    if conf["optim"] is not None:
        try:
            optimizer = build_optimizer(model, **conf["optim"])
        except ConfigError as error:
            raise ConfigError(with_key(str(error), "optim", conf["optim"])) from error
    elif callable(configure := getattr(model, "configure_optimizers", None)):
        optimizer, own = configure()
    else:
        raise ConfigError(
            f"optim=null: {type(model).__name__} has no configure_optimizers; choose an "
            "optimizer, as optim=adamw"
        )
    if conf["schedule"] is None:
        return optimizer, own or WarmupConstantLR(optimizer, warmup_iters=0)
    if own is not None:
        raise ConfigError(
            "optim=null: the model has a schedule of its own; add {override /schedule: null} to "
            "the defaults of the experiment"
        )
    return optimizer, build(conf["schedule"], "schedule", optimizer=optimizer)


def _build_datasets(conf: Conf, ranks: Topology) -> tuple[Any, Any]:
    """Build the training and the evaluation set; check that all ranks have the same."""
    data = conf["data"]
    open_before = open_files()
    sets = {
        f"data.{name}": build(data[name], f"data.{name}")
        for name in ("train", "eval")
        if data[name] is not None
    }
    train_set, eval_set = sets.get("data.train"), sets.get("data.eval")
    if data["loader"] is not None:
        sets.pop("data.train", None)  # may be a stream, or another part of the data per rank
    if ranks.world_size > 1:
        # where CUDA is in use, fork only if loader processes are forked anyway
        may_fork = data["workers"] > 0 or not torch.cuda.is_initialized()
        check_same_data(sets, seed=conf["seed"], open_before=open_before, may_fork=may_fork)
    return train_set, eval_set


def _loading(conf: Conf, ranks: Topology) -> dict[str, Any]:
    """Return the arguments that both loaders take."""
    data = conf["data"]
    collate = data["collate"]
    return {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "workers": data["workers"],
        "seed": conf["seed"],
        "seed_samples": data["seed_samples"],
        "collate": None if collate is None else locate(collate, "data.collate"),
    }


def _train_loader(conf: Conf, ranks: Topology, dataset: Any, *, accumulation: int) -> Any:
    data = conf["data"]
    arguments = _loading(conf, ranks) | {
        "batch_size": data["batch_size"],
        "accumulation": accumulation,
        "pin_memory": local_device().type == "cuda",
    }
    if dataset is not None:
        arguments["dataset"] = dataset
    if data["sampler"] is not None:
        arguments["sampler"] = _sampler(conf, dataset)
    if data["loader"] is None:
        if dataset is None:
            raise ConfigError("data.train: expected a value, the _target_ of a data set")
        return TrainLoader(**arguments)
    loader = build(data["loader"], "data.loader", **arguments)
    if not isinstance(loader, (Seekable, Iterable)):
        expected = "a loader with a method batches(start_iter); derive it from distrain.data.Loader"
        raise wrong("data.loader._target_", data["loader"]["_target_"], expected)
    return loader


def _sampler(conf: Conf, dataset: Any) -> SampleOrder:
    node = conf["data"]["sampler"]
    if dataset is None:
        raise ConfigError("data.train: expected a value, as data.sampler takes its samples")
    context = {"dataset": dataset, "batch_size": conf["data"]["batch_size"], "seed": conf["seed"]}
    sampler = build(node, "data.sampler", **context)
    if not isinstance(sampler, SampleOrder):
        expected = "a sampler; derive it from distrain.data.SampleOrder"
        raise wrong("data.sampler._target_", node["_target_"], expected)
    return sampler


def eval_loader(conf: Conf, ranks: Topology, dataset: Any) -> EvalLoader:
    """Return the loader of this rank's share of the evaluation set."""
    batch_size = conf["data"]["eval_batch_size"] or conf["data"]["batch_size"]
    share = max(1, batch_size // ranks.world_size)
    return EvalLoader(dataset, batch_size=share, **_loading(conf, ranks))


def _build_hooks(**context: Any) -> dict[str, HookBase]:
    hooks: dict[str, HookBase] = {}
    for name, node in context["conf"]["hooks"].items():
        if node is None:
            continue
        hooks[name] = build(node, f"hooks.{name}", **context)
        if not isinstance(hooks[name], HookBase):
            expected = "a hook; derive it from distrain.HookBase"
            raise wrong(f"hooks.{name}._target_", node["_target_"], expected)
    return hooks
