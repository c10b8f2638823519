"""Evaluation sets and metrics that a configuration names: `data.eval`, `eval.metrics`."""

from __future__ import annotations

from typing import Any

from distrain.checks import did_you_mean, name_part, wrong
from distrain.config.import_path import locate
from distrain.config.instantiate import build
from distrain.data.loader import EvalLoader
from distrain.errors import ConfigError
from distrain.trainer.set_metrics import KEY, check_metrics

Conf = dict[str, Any]


def eval_nodes(conf: Conf) -> dict[str, Any]:
    """Return the nodes of the evaluation sets by name; "" is the name of one without a name.

    Raises:
        ConfigError: a name does not work as a part of a scalar's name.
    """
    node = conf["data"]["eval"]
    if node is None:
        return {}
    if "_target_" in node:
        return {"": node}
    for name in node:
        name_part(f"data.eval.{name}", name)
    return {name: of_set for name, of_set in node.items() if of_set is not None}


def eval_key(name: str) -> str:
    """Return the key of an evaluation set in the configuration."""
    return f"data.eval.{name}" if name else "data.eval"


def build_sets(conf: Conf) -> dict[str, Any]:
    """Build the evaluation sets by name."""
    return {name: build(node, eval_key(name)) for name, node in eval_nodes(conf).items()}


def only_set(conf: Conf, name: str) -> Conf:
    """Return a configuration with one of its evaluation sets; ConfigError if it has no such set."""
    nodes = eval_nodes(conf)
    if name not in nodes or not name:
        hint = did_you_mean(name, filter(None, nodes))
        raise wrong("--set", name, f"the name of a set in data.eval; {hint}")
    return {**conf, "data": {**conf["data"], "eval": {name: nodes[name]}}}


def eval_loader(
    conf: Conf, sets: dict[str, Any], **loading: Any
) -> EvalLoader | dict[str, EvalLoader] | None:
    """Return the `EvalLoader(**loading)` of the evaluation set, or those of several by name."""
    if not sets:
        return None
    batch_size = conf["data"]["eval_batch_size"] or conf["data"]["batch_size"]
    share = max(1, batch_size // loading["world_size"])
    loaders = {
        name: EvalLoader(dataset, batch_size=share, **loading) for name, dataset in sets.items()
    }
    return loaders.get("", loaders)


def build_metrics(conf: Conf) -> dict[str, Any]:
    """Build the metrics over whole sets: objects of nodes, functions by their import path.

    Raises:
        ConfigError: one cannot be built, or cannot be gathered over ranks.
    """
    metrics = {}
    for name, node in conf["eval"]["metrics"].items():
        key = f"{KEY}.{name}"
        if node is not None:
            metrics[name] = locate(node, key) if isinstance(node, str) else build(node, key)
    if metrics and not eval_nodes(conf):
        raise ConfigError(f"{KEY}: expected data.eval, a data set for them")
    check_metrics(metrics)
    return metrics
