"""What would be trained, in words: parameter groups, schedule, hooks, samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrain.checkpoint.store import CheckpointStore
from distrain.config.compose import build
from distrain.distributed.ranks import Topology
from distrain.job.strategy import build_strategy
from distrain.job.training import build_parts
from distrain.optim.groups import GroupSettings, explain_groups, format_groups
from distrain.optim.optimizer import representative_group
from distrain.run_layout import CHECKPOINTS
from distrain.schedule.preview import schedule_values
from distrain.trainer.hook import MOMENTS, HookBase
from distrain.trainer.trainer import Trainer


def plan(conf: dict[str, Any], run_dir: str) -> str:
    """Return a text on what a configuration trains; builds everything, trains nothing.

    Args:
        conf: resolved configuration.
        run_dir: folder of the run; not touched.

    Raises:
        ConfigError: a part cannot be built.
    """
    checkpoints = CheckpointStore(Path(run_dir, CHECKPOINTS), **conf["checkpoint"])
    strategy = build_strategy(conf["trainer"])
    parts = build_parts(
        conf, where=Topology(), run_dir=run_dir, checkpoints=checkpoints, strategy=strategy
    )
    trainer = parts.trainer
    num = sum(p.numel() for p in trainer.module.parameters())
    stream = parts.train_loader.stream
    max_iter = conf["trainer"]["max_iter"]
    epochs = max_iter * stream.batch_size / stream.size
    lines = [
        f"run         {run_dir}",
        f"model       {conf['model']['_target_']}, {num:,} parameters",
        f"data        {stream.size:,} samples, {stream.batch_size} in a step over all ranks, "
        f"{max_iter:,} steps = {epochs:.1f} epochs",
        f"optimizer   {type(trainer.optimizer).__name__}, {len(trainer.optimizer.param_groups)} "
        "groups",
        "",
        _groups(conf["optim"], trainer),
        "",
        "learning rate",
        *_schedule_lines(conf, trainer.optimizer, max_iter),
        "",
        "hooks, in order",
        *(
            f"  {hook.order:3d}  {name:12s}  {_moments(hook)}"
            for name, hook in trainer.hooks.items()
        ),
        "",
        "launch",
    ]
    return "\n".join(lines)


def _groups(optim: dict[str, Any] | None, trainer: Trainer) -> str:
    """Return the table of parameters, or where it comes from if the model has its own groups."""
    if optim is None:
        return "the model's own groups, by its configure_optimizers"
    keys = {"lr", "weight_decay", *GroupSettings.__annotations__}
    rows = explain_groups(trainer.module, **{k: v for k, v in optim.items() if k in keys})
    return format_groups(rows)


def _schedule_lines(conf: dict[str, Any], optimizer: Any, max_iter: int) -> list[str]:
    group = representative_group(optimizer)
    at = sorted({0, max_iter // 100, max_iter // 10, max_iter // 4, max_iter // 2, max_iter - 1})
    if conf["optim"] is None and conf["schedule"] is None:
        return ["  the model's own, by its configure_optimizers"]
    if conf["schedule"] is None:
        values = [float(optimizer.param_groups[group]["lr"])] * len(at)
    else:
        values = schedule_values(
            lambda optimizer: build(conf["schedule"], "schedule", optimizer=optimizer),
            optimizer,
            at,
            group=group,
        )
    return [f"  step {step:>9,}  {lr:.6g}" for step, lr in zip(at, values, strict=True)]


def _moments(hook: HookBase) -> str:
    own = [m for m in MOMENTS if getattr(type(hook), m) is not getattr(HookBase, m)]
    ranks = "" if hook.ranks == "all" else " (rank 0 only)"
    return f"{type(hook).__name__}: {', '.join(own)}{ranks}"
