"""Build the optimizer and the schedule that a configuration names."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from distrain.config.instantiate import build_nested, with_key
from distrain.errors import ConfigError
from distrain.optim.optimizer import build_optimizer
from distrain.schedule.schedules import WarmupConstantLR

Conf = dict[str, Any]


def build_optimization(conf: Conf, model: nn.Module) -> tuple[Optimizer, Any]:
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
    return optimizer, build_nested(conf["schedule"], "schedule", optimizer=optimizer)
