"""Build the objects that a configuration names: optimizer, schedule, data, hooks, trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from distrain.checkpoint.store import CheckpointStore
from distrain.config.instantiate import build_as
from distrain.data.epochs import iters_per_epoch
from distrain.data.stream import micro_batches
from distrain.distributed.ranks import Topology
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError
from distrain.job.data import build_datasets, loading, train_loader
from distrain.job.epochs import in_iterations
from distrain.job.eval_sets import build_metrics, eval_loader
from distrain.job.optimization import build_optimization
from distrain.job.restore import settings_of
from distrain.job.strategy import STRATEGY_KEYS
from distrain.trainer.hook import HookBase
from distrain.trainer.step import Step
from distrain.trainer.trainer import Trainer

Conf = dict[str, Any]

NOT_OF_TRAINER = (
    *("max_iter", "max_epochs", "deterministic", "float32_matmul", "sync_batchnorm"),
    *STRATEGY_KEYS,
)
"""Keys of `trainer` that are used before the Trainer exists."""


@dataclass(frozen=True)
class Parts:
    """The objects of a run.

    Attributes:
        conf: the configuration, with lengths in iterations that were given in epochs.
        loader: a `distrain.data.Loader` or another source of batches.
    """

    conf: Conf
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
    """Build everything but the model, in the order data, optimizer, schedule, hooks, trainer.

    Hooks get `eval_loader`, `metrics` (those of `eval.metrics`, if there are any), `schedule`,
    `checkpoints`, `run_dir` or `conf` if they have a keyword of that name.

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
    data_ranks = strategy.data_ranks(ranks)
    settings["accumulation"] = micro_batches(
        conf["data"]["batch_size"],
        ranks=data_ranks.world_size,
        accumulation=settings["accumulation"],
        largest=largest_forward,
    )
    train_set, eval_sets = build_datasets(conf, ranks)
    _check_evaluation(model, eval_sets)
    loader = train_loader(conf, data_ranks, train_set, accumulation=settings["accumulation"])
    per_step = {
        "forwards": data_ranks.world_size * settings["accumulation"],
        "accumulation": settings["accumulation"],
    }
    lengths = in_iterations(conf, lambda: iters_per_epoch(loader, **per_step))
    optimizer, schedule = build_optimization(lengths, model)
    metrics = build_metrics(conf)
    hooks = _build_hooks(
        eval_loader=eval_loader(conf, eval_sets, **loading(conf, data_ranks)),
        **({"metrics": metrics} if metrics else {}),
        schedule=schedule,
        checkpoints=checkpoints,
        run_dir=run_dir,
        conf=conf,
    )
    settings |= {"hooks": hooks, "strategy": strategy, "step": _build_step(conf["step"])}
    trainer = Trainer(model, optimizer, loader, **settings)
    trainer.settings = settings_of(lengths)
    return Parts(lengths, trainer, loader, schedule)


def _check_evaluation(model: nn.Module, eval_sets: Mapping[str, Any]) -> None:
    if eval_sets and isinstance(model, nn.ModuleDict):
        raise ConfigError(
            f"data.eval: expected null, as {', '.join(model)} have no common metrics; make them "
            "parts of one module with a method metrics"
        )


def _build_step(node: Conf | None) -> Step | None:
    return None if node is None else build_as(Step, node, "step", "a class of distrain.Step")


def _build_hooks(**context: Any) -> dict[str, HookBase]:
    expected = "a hook; derive it from distrain.HookBase"
    return {
        name: build_as(HookBase, node, f"hooks.{name}", expected, **context)
        for name, node in context["conf"]["hooks"].items()
        if node is not None
    }
