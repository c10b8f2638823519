"""Build the optimizers and the schedules that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distrain.checks import did_you_mean
from distrain.config.instantiate import build_nested, with_key
from distrain.errors import ConfigError
from distrain.optim.optimizer import build_optimizer
from distrain.schedule.schedules import WarmupConstantLR

Conf = dict[str, Any]
Optimizers = Optimizer | Mapping[str, Optimizer]


def build_optimization(conf: Conf, model: nn.Module) -> tuple[Optimizers, Any]:
    """Return the configured optimizer and schedule; with optim=null those of the model.

    Both are by name where `optim` is.
    """
    own = None
    if conf["optim"] is not None:
        optimizer = _optimizers(conf["optim"], model)
    elif callable(configure := getattr(model, "configure_optimizers", None)):
        optimizer, own = configure()
    else:
        raise ConfigError(
            f"optim=null: {type(model).__name__} has no configure_optimizers; choose an "
            "optimizer, as optim=adamw"
        )
    if conf["schedule"] is None:
        return optimizer, own or _constant(optimizer)
    if own is not None:
        raise ConfigError(
            "optim=null: the model has a schedule of its own; add {override /schedule: null} to "
            "the defaults of the experiment"
        )
    return optimizer, _schedules(conf["schedule"], optimizer)


def schedule_node(node: Conf, name: str) -> tuple[Conf | None, str]:
    """Return the node of one optimizer's schedule, and its key; None: the rate is constant."""
    return (node, "schedule") if "_target_" in node else (node.get(name), f"schedule.{name}")


def _optimizers(node: Conf, model: nn.Module) -> Optimizers:
    if is_single(node):
        return _optimizer(node, "optim", model)
    parts = dict(model.named_children())
    for name in node:
        if name not in parts:
            raise ConfigError(
                f"optim.{name}: expected the name of a part of the model; "
                f"{did_you_mean(name, parts)}"
            )
    return {name: _optimizer(each, f"optim.{name}", parts[name]) for name, each in node.items()}


def is_single(node: Conf) -> bool:
    """Whether a node of `optim` is one optimizer; else it is several by name."""
    return not all(isinstance(value, Mapping) for value in node.values())


def _optimizer(node: Conf, key: str, model: nn.Module) -> Optimizer:
    try:
        return build_optimizer(model, **node)
    except ConfigError as error:
        raise ConfigError(with_key(str(error), key, node)) from error


def _constant(optimizer: Optimizers) -> Any:
    if isinstance(optimizer, Mapping):
        return {name: _constant(each) for name, each in optimizer.items()}
    return WarmupConstantLR(optimizer, warmup_iters=0)


def _schedules(node: Conf, optimizer: Optimizers) -> Any:
    if not isinstance(optimizer, Mapping):
        if "_target_" not in node:
            raise ConfigError(
                f"schedule: {', '.join(node)}: expected one _target_, as there is one optimizer"
            )
        return build_nested(node, "schedule", optimizer=optimizer)
    for name in () if "_target_" in node else node:
        if name not in optimizer:
            hint = did_you_mean(name, optimizer)
            raise ConfigError(f"schedule.{name}: expected the name of an optimizer; {hint}")
    schedules = {}
    for name, each in optimizer.items():
        own, key = schedule_node(node, name)
        schedules[name] = build_nested(own, key, optimizer=each) if own else _constant(each)
    return schedules
