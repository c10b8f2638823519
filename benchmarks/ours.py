"""Ours as benchmarks train with it: all default hooks, all writers, and scalars put each step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distrain import HookBase, get_event_storage
from distrain.checkpoint.store import CheckpointStore
from distrain.hooks import (
    EvalHook,
    GpuStats,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
    ReplicaGuard,
    StragglerWatch,
)
from distrain.schedule.schedules import WarmupCosineLR
from distrain.writers import ConsoleWriter, JsonLinesWriter, TensorBoardWriter

Scalars = Mapping[str, float | Tensor]


class NeverSaves(PeriodicCheckpointer):
    """The checkpoint hook between two saves, which is all that this benchmark sees of it."""

    def after_train(self) -> None:
        self._checkpoints.close()


class PutsScalars(HookBase):
    """Puts scalars as a user's hook would: all in one call, or one by one."""

    def __init__(self, scalars: Scalars, *, one_by_one: bool = False) -> None:
        self._scalars, self._one_by_one = scalars, one_by_one

    def after_step(self) -> None:
        storage = get_event_storage()
        if self._one_by_one:
            for name, value in self._scalars.items():
                storage.put_scalar(name, value)
        else:
            storage.put_scalars(**self._scalars)


def default_hooks(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, HookBase]:
    """Return the hooks of conf/hooks/default.yaml, writing into a folder that may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "timer": IterationTimer(),
        "schedule": LRScheduler(WarmupCosineLR(optimizer, 10**6, warmup_iters=100)),
        "straggler": StragglerWatch(),
        "guard": ReplicaGuard(),
        "gpu": GpuStats(),
        "eval": EvalHook(),
        "checkpoint": NeverSaves(checkpoints=CheckpointStore(folder / "checkpoints")),
        "writer": PeriodicWriter(
            [
                TensorBoardWriter(),
                JsonLinesWriter(),
                ConsoleWriter((folder / "console.txt").open("w")),
            ],
            run_dir=str(folder),
        ),
    }


def new_scalars(num: int, kind: str) -> Scalars:
    """Return what is put each step."""
    values = torch.linspace(0, 1, num)
    of_kind = values.unbind() if kind == "tensor" else values.tolist()
    return {f"value_{number:03}": value for number, value in enumerate(of_kind)}
