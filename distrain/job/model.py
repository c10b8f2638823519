"""The model of a run: built, given its initial weights, transformed, moved to its device."""

from __future__ import annotations

from typing import Any

from torch import nn

from distrain.checks import wrong
from distrain.config.instantiate import build
from distrain.distributed.ranks import Topology, local_device
from distrain.distributed.rng import seed_everything
from distrain.distributed.strategy import Strategy
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.weights.load import start_from


def build_model(
    conf: dict[str, Any], *, ranks: Topology, strategy: Strategy, is_new: bool
) -> nn.Module:
    """Build the model on this rank's device, with the same initial weights on all ranks.

    Args:
        conf: resolved configuration.
        ranks: position of this process.
        strategy: a sharded model stays on the CPU; its shards are moved later.
        is_new: load `init.weights`, if given; else a checkpoint will be loaded.

    Raises:
        ConfigError: the model or a transform is not a module.
    """
    seed_everything(conf["seed"], rank=0)
    model = _built(conf["model"])
    # before the transforms, which may rename parameters or add new ones
    if is_new and conf["init"].get("weights"):
        start_from(model, **conf["init"])
    for name, node in conf["transforms"].items():
        if node is not None:
            key = f"transforms.{name}"
            model = _module(build(node, key, model=model), key, node)
    if conf["trainer"]["sync_batchnorm"] and ranks.world_size > 1:
        model = convert_sync_batchnorm(model)
    return model if strategy.is_sharded else model.to(local_device())


def _built(node: dict[str, Any]) -> nn.Module:
    """Build the model; a `ModuleDict` of several by name."""
    if "_target_" in node:
        return _module(build(node, "model"), "model", node)
    parts = {name: (f"model.{name}", each) for name, each in node.items()}
    return nn.ModuleDict(
        {name: _module(build(each, key), key, each) for name, (key, each) in parts.items()}
    )


def _module(built: Any, key: str, node: dict[str, Any]) -> nn.Module:
    if not isinstance(built, nn.Module):
        kind = type(built).__name__
        raise wrong(f"{key}._target_", node["_target_"], f"a torch.nn.Module; it returned {kind}")
    return built
