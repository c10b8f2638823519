"""Build the data sets and loaders that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from distrain.checks import wrong
from distrain.config.import_path import locate
from distrain.config.instantiate import build, build_as
from distrain.data.collate import Collate
from distrain.data.iterable import IterableLoader
from distrain.data.loader import TrainLoader
from distrain.data.samplers import SampleOrder
from distrain.data.source import FirstSample, is_iterable_style, is_split_by_library
from distrain.distributed.ranks import Topology, local_device
from distrain.errors import ConfigError
from distrain.job.build_first import build_first
from distrain.job.eval_sets import build_sets, eval_key
from distrain.job.same_data import check_same_data, open_files
from distrain.trainer.trainer import Seekable

Conf = dict[str, Any]

_READS_A_PART = (
    "; or, where each rank reads its own part, "
    "data.loader={_target_: distrain.data.IterableLoader, splits_itself: true}"
)


def build_datasets(conf: Conf, ranks: Topology) -> tuple[Any, dict[str, Any]]:
    """Build the training set and the evaluation sets; check that all ranks have the same.

    Evaluation sets are by name, see `eval_sets.eval_nodes`.
    """
    data = conf["data"]
    open_before = open_files()

    def build_all() -> tuple[Any, dict[str, Any]]:
        train_set = None if data["train"] is None else build(data["train"], "data.train")
        return train_set, build_sets(conf)

    found = build_first(build_all, ranks) if data["build_first"] else build_all()
    train_set, eval_sets = found
    sets = {eval_key(name): dataset for name, dataset in eval_sets.items()}
    fix = ""
    # that of a loader may be another part per rank, as that of a library that splits it
    if train_set is not None and data["loader"] is None and not is_split_by_library(train_set):
        is_read_in_order = is_iterable_style(train_set)
        compared = FirstSample(train_set) if is_read_in_order else train_set
        sets, fix = {"data.train": compared, **sets}, _READS_A_PART * is_read_in_order
    if ranks.world_size > 1:
        # where CUDA is in use, fork only if loader processes are forked anyway
        may_fork = data["workers"] > 0 or not torch.cuda.is_initialized()
        check_same_data(
            sets, seed=conf["seed"], open_before=open_before, may_fork=may_fork, fix=fix
        )
    return train_set, eval_sets


def loading(conf: Conf, ranks: Topology) -> dict[str, Any]:
    """Return the arguments that the loaders of training and evaluation take."""
    data = conf["data"]
    return {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "workers": data["workers"],
        "seed": conf["seed"],
        "seed_samples": data["seed_samples"],
        "collate": _collate(data["collate"]),
    }


def _collate(node: Any) -> Collate | None:
    """Return the function that makes a batch of samples; None is torch's."""
    if node is None:
        return None
    is_path = isinstance(node, str)
    found = locate(node, "data.collate") if is_path else build(node, "data.collate")
    if not callable(found) or (is_path and isinstance(found, type)):
        key, value = ("", node) if is_path else ("._target_", node["_target_"])
        expected = "a function of a list of samples; a class by _target_, a function by its path"
        raise wrong(f"data.collate{key}", value, expected)
    return found  # type: ignore[no-any-return]


def train_loader(conf: Conf, ranks: Topology, dataset: Any, *, accumulation: int) -> Any:
    """Return the loader of this rank's training batches.

    Raises:
        ConfigError: `data.loader` has no `batches`, or a value is missing.
    """
    data = conf["data"]
    arguments = loading(conf, ranks) | {
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
        return (IterableLoader if is_iterable_style(dataset) else TrainLoader)(**arguments)
    expected = "a loader with a method batches(start_iter); derive it from distrain.data.Loader"
    kinds: Any = (Seekable, Iterable)
    return build_as(kinds, data["loader"], "data.loader", expected, **arguments)


def _sampler(conf: Conf, dataset: Any) -> SampleOrder:
    node = conf["data"]["sampler"]
    if dataset is None:
        raise ConfigError("data.train: expected a value, as data.sampler takes its samples")
    if is_iterable_style(dataset):
        kind = type(dataset).__name__
        raise ConfigError(f"data.sampler: expected null, as {kind} is read in its own order")
    context = {"dataset": dataset, "batch_size": conf["data"]["batch_size"], "seed": conf["seed"]}
    expected = "a sampler; derive it from distrain.data.SampleOrder"
    return build_as(SampleOrder, node, "data.sampler", expected, **context)
