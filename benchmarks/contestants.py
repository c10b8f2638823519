"""Those who take turns in `benchmarks/peers.py`: each trains the same, and logs in its own way.

Where a peer has no way to combine scalars over ranks, its part is written as its manual would have
it. transformers has no way to log more than the loss, and mmengine logs the values of rank 0.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.bare_loop import bare_loop
from benchmarks.common import Stopwatch
from benchmarks.models import mlp, new_batches, new_optimizer
from benchmarks.ours import PutsScalars, default_hooks
from distrain import Trainer

WARM_UP = 60  # steps before the first turn
WINDOW = 20
FOREVER = 10**9  # iterations, for those who want to know


class Enough(Exception):
    """No more turns are to come; it ends a training that would go on for ever."""


class Batches(IterableDataset[Any]):
    """Ready batches, a number of them each time that the pipe says how many.

    It answers with what a step took, and waits for the next turn; at a None it raises Enough.

    Attributes:
        settle: called at both ends of what is measured: it finishes what was put off.
    """

    def __init__(self, pipe: Connection) -> None:
        self.settle: Callable[[], object] = lambda: None
        self._pipe = pipe
        self._batches = itertools.cycle(new_batches((64,)))

    def __len__(self) -> int:  # mmengine asks for it
        return FOREVER

    def __iter__(self) -> Iterator[Any]:
        yield from itertools.islice(self._batches, WARM_UP)
        while (steps := self._pipe.recv()) is not None:
            self.settle()
            with Stopwatch() as watch:
                yield from itertools.islice(self._batches, steps)
                self.settle()
            self._pipe.send(watch.cost.per(steps))
        raise Enough


@dataclass(frozen=True)
class Task:
    """What a contestant trains on, and what it logs beside the loss."""

    batches: Batches
    folder: Path
    scalars: dict[str, float] = field(default_factory=dict)

    @property
    def loader(self) -> DataLoader[Any]:
        """Return the same loader for all."""
        return DataLoader(self.batches, batch_size=None)


def bare_ddp(task: Task) -> None:
    """Train with DDP and nothing else."""
    bare_loop(DistributedDataParallel(mlp()), task.folder)(task.loader)


def ours(task: Task) -> None:
    """Train with a Trainer, all default hooks and writers."""
    model = mlp()
    optimizer = new_optimizer(model)
    hooks = default_hooks(optimizer, task.folder)
    if task.scalars:
        hooks["scalars"] = PutsScalars(task.scalars)
    trainer = Trainer(model, optimizer, task.loader, hooks=hooks)

    def settle() -> None:
        trainer.reduction.drain(trainer.storage.iter)
        hooks["writer"].after_step()

    task.batches.settle = settle
    trainer.train(0, FOREVER)


def with_accelerate(task: Task) -> None:
    """Train with an Accelerator; it reduces and tracks every 20 steps."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=task.folder)
    accelerator.init_trackers("run")
    model = mlp()
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    sums: dict[str, Any] = {}
    for step, (inputs, labels) in enumerate(task.loader):
        loss = model(inputs, labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss.detach(), **task.scalars}.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % WINDOW == WINDOW - 1:
            packed = torch.tensor([float(value) / WINDOW for value in sums.values()])
            means = accelerator.reduce(packed, "mean").tolist()
            accelerator.log(dict(zip(sums, means, strict=True)), step=step)
            sums = {}
    for tracker in accelerator.trackers:  # end_training would end the process group too
        tracker.finish()


def with_torchtnt(task: Task) -> None:
    """Train a TrainUnit; it reduces and logs every 20 steps."""
    from torchtnt.framework.state import State
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit
    from torchtnt.utils.loggers.tensorboard import TensorBoardLogger

    class Unit(TrainUnit[Any]):
        def __init__(self) -> None:
            super().__init__()
            self.module = DistributedDataParallel(mlp())
            self.optimizer = new_optimizer(self.module)
            self.logger = TensorBoardLogger(str(task.folder))
            self.sums: dict[str, Any] = {}

        def train_step(self, state: State, data: Any) -> None:
            loss = self.module(*data)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, value in {"loss": loss.detach(), **task.scalars}.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            step = self.train_progress.num_steps_completed
            if step % WINDOW == WINDOW - 1:
                packed = torch.tensor([float(value) / WINDOW for value in self.sums.values()])
                dist.all_reduce(packed)
                means = (packed / dist.get_world_size()).tolist()
                self.logger.log_dict(dict(zip(self.sums, means, strict=True)), step)
                self.sums = {}

    train(Unit(), task.loader, max_epochs=1)


def with_mmengine(task: Task) -> None:
    """Train with a Runner; it logs the values of rank 0 only."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, inputs: Tensor, labels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            values = {name: torch.tensor(value) for name, value in task.scalars.items()}
            return {"loss": self.net(inputs, labels), **values}

    model = Model()
    Runner(
        model=model,
        work_dir=str(task.folder),
        train_dataloader=task.loader,
        train_cfg={"by_epoch": False, "max_iters": FOREVER},
        optim_wrapper={"optimizer": new_optimizer(model)},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": WINDOW},
            "checkpoint": {"type": "CheckpointHook", "interval": 10**9, "save_last": False},
            "sampler_seed": None,  # the loader has no sampler
        },
        log_processor={"by_epoch": False},
        visualizer={"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}]},
        launcher="pytorch",
        # its default wrapper takes for granted that there is a GPU
        cfg={
            "model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None},
        },
        log_level="ERROR",
        experiment_name=f"run_{time.time_ns()}",
    ).train()


def with_lightning(task: Task) -> None:
    """Train with a Trainer; `sync_dist` combines over ranks."""
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.plugins.environments import LightningEnvironment

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = self.net(*batch)
            self.log_dict({"loss": loss, **task.scalars}, sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return new_optimizer(self)

    lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[LightningEnvironment()],
        max_steps=FOREVER,
        logger=TensorBoardLogger(task.folder),
        log_every_n_steps=WINDOW,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), task.loader)


def with_transformers(task: Task) -> None:
    """Train with the Trainer of transformers; it logs the loss, averaged over ranks."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(inputs, labels)}

    class Named(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return ({"inputs": x, "labels": y} for x, y in task.batches)

    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Named(), batch_size=None)

    model = Model()
    arguments = TrainingArguments(
        output_dir=str(task.folder),
        max_steps=FOREVER,
        logging_steps=WINDOW,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    trainer = OwnLoader(
        model, arguments, train_dataset=Named(), optimizers=(new_optimizer(model), None)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


TRAIN: dict[str, Callable[[Task], None]] = {
    "bare DDP": bare_ddp,
    "bare DDP again": bare_ddp,
    "distrain": ours,
    "accelerate": with_accelerate,
    "torchtnt": with_torchtnt,
    "mmengine": with_mmengine,
    "lightning": with_lightning,
    "transformers": with_transformers,
}
