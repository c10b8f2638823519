"""Describe a run without training: parameter groups, schedule, hooks, samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distrain.config.instantiate import build_nested
from distrain.data.loader import Loader
from distrain.distributed.ranks import Topology
from distrain.job.build import build_parts
from distrain.job.checkpoints import open_store
from distrain.job.eval_sets import eval_nodes
from distrain.job.model import build_model
from distrain.job.optimization import schedule_node
from distrain.job.strategy import build_strategy
from distrain.optim.groups import format_groups
from distrain.optim.optimizer import explain_optimizer, representative_group
from distrain.schedule.preview import schedule_values
from distrain.trainer.hook import MOMENTS, HookBase
from distrain.trainer.trainer import Trainer


def plan(conf: dict[str, Any], run_dir: str) -> str:
    """Build everything as one rank and describe it; trains nothing, and leaves `run_dir` as it is.

    Raises:
        ConfigError: a part cannot be built.
    """
    checkpoints = open_store(conf["checkpoint"], run_dir)
    ranks = Topology()
    strategy = build_strategy(conf["trainer"])
    model = build_model(conf, ranks=ranks, strategy=strategy, is_new=True)
    parts = build_parts(
        conf,
        model=model,
        strategy=strategy,
        ranks=ranks,
        run_dir=run_dir,
        checkpoints=checkpoints,
    )
    trainer, conf = parts.trainer, parts.conf
    num_parameters = sum(p.numel() for p in trainer.module.parameters())
    lines = [
        f"run         {run_dir}",
        f"model       {_model(conf['model'])}, {num_parameters:,} parameters",
        f"data        {_samples(conf, parts.loader)}",
        *_evaluation(conf),
        *([f"step        {conf['step']['_target_']}"] if conf["step"] else []),
        *itertools.chain.from_iterable(
            _optimizer_lines(conf, trainer, name) for name in trainer.optimizers
        ),
        "hooks, in order",
        *(
            f"  {hook.order:3d}  {name:12s}  {_moments(hook)}"
            for name, hook in trainer.hooks.items()
        ),
        "",
        "launch",
    ]
    return "\n".join(lines)


def _samples(conf: dict[str, Any], loader: Any) -> str:
    batch_size, steps = conf["data"]["batch_size"], conf["trainer"]["max_iter"]
    per_step = f"{batch_size} per step over all ranks, {steps:,} steps"
    if not isinstance(loader, Loader) or loader.num_samples is None:
        return per_step
    size = loader.num_samples
    return f"{size:,} samples, {per_step} = {steps * batch_size / size:.1f} epochs"


def _evaluation(conf: dict[str, Any]) -> list[str]:
    nodes = eval_nodes(conf)
    if not nodes:
        return []
    sets = [f"{name}: {node['_target_']}".removeprefix(": ") for name, node in nodes.items()]
    metrics = [name for name, node in conf["eval"]["metrics"].items() if node is not None]
    of_sets = f"; over each set: {', '.join(metrics)}" if metrics else ""
    return [f"evaluation  {', '.join(sets)}{of_sets}"]


def _model(node: dict[str, Any]) -> str:
    if "_target_" in node:
        return str(node["_target_"])
    return ", ".join(f"{name}: {each['_target_']}" for name, each in node.items())


def _optimizer_lines(conf: dict[str, Any], trainer: Trainer, name: str) -> list[str]:
    """Describe one optimizer: its groups and its learning rate over the iterations."""
    optimizer, node = trainer.optimizers[name], conf["optim"]
    module, of = trainer.module, f" of {name}" if name else ""
    if name and node is not None:
        module, node = dict(module.named_children())[name], node[name]
    kind, num = type(optimizer).__name__, len(optimizer.param_groups)
    rates = _schedule_lines(conf, optimizer, name)
    return [
        f"optimizer   {kind}{of}, {num} groups",
        "",
        _groups(node, module),
        "",
        f"learning rate{of}",
        *rates,
        "",
    ]


def _groups(optim: dict[str, Any] | None, module: nn.Module) -> str:
    if optim is None:
        return "the model's own groups, by its configure_optimizers"
    return format_groups(explain_optimizer(module, **optim))


def _schedule_lines(conf: dict[str, Any], optimizer: Optimizer, name: str) -> list[str]:
    steps = conf["trainer"]["max_iter"]
    group = representative_group(optimizer)
    at = sorted({0, steps // 100, steps // 10, steps // 4, steps // 2, steps - 1})
    if conf["optim"] is None and conf["schedule"] is None:
        return ["  the model's own, by its configure_optimizers"]
    node, key = schedule_node(conf["schedule"] or {}, name)
    if not node:
        values = [float(optimizer.param_groups[group]["lr"])] * len(at)
    else:
        values = schedule_values(
            lambda optimizer: build_nested(node, key, optimizer=optimizer),
            optimizer,
            at,
            group=group,
        )
    shown = ["not known before" if math.isnan(lr) else f"{lr:.6g}" for lr in values]
    return [f"  step {step:>9,}  {lr}" for step, lr in zip(at, shown, strict=True)]


def _moments(hook: HookBase) -> str:
    own = [m for m in MOMENTS if getattr(type(hook), m) is not getattr(HookBase, m)]
    ranks = "" if hook.ranks == "all" else " (rank 0 only)"
    return f"{type(hook).__name__}: {', '.join(own)}{ranks}"
