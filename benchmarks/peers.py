"""Two gloo ranks: a bare DDP loop, ours, and the peers that are installed; all take turns.

Every contestant is two processes that live through all rounds and wait while others train. All
train the same small MLP with the same optimizer on the same batches, and bring the mean over ranks
of 1 or 30 scalars to TensorBoard (or what the peer has) every 20 steps; bare logs its loss on
rank 0. Where a peer has no such thing, its part is written as its manual would have it. Measured
is what lies between two batches: no start, no end.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
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

from benchmarks.common import Cost, estimate, print_table
from benchmarks.models import mlp
from benchmarks.overhead import (
    PutsScalars,
    bare_loop,
    default_hooks,
    new_batches,
    new_optimizer,
    new_scalars,
)

WARM_UP = 60  # steps of each round that are not measured
WINDOW = 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REQUIRES = {
    "bare DDP": "torch",
    "distrain": "torch",
    "accelerate": "accelerate",
    "torchtnt": "torchtnt",
    "mmengine": "mmengine",
    "lightning": "lightning",
    "transformers": "transformers",
}


class Batches(IterableDataset[Any]):
    """A number of ready batches that measures the time between two of them."""

    cost: Cost

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.max_iter = WARM_UP + steps + 2  # of what counts iterations; some load a batch ahead
        self._batches = new_batches((64,))

    def __len__(self) -> int:  # mmengine asks for it
        return self.max_iter + 1

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.max_iter + 1):
            if number == WARM_UP:
                begin = time.process_time(), time.perf_counter()
            if number == WARM_UP + self._steps:
                cost = Cost(time.process_time() - begin[0], time.perf_counter() - begin[1])
                self.cost = cost.per(self._steps)
            yield self._batches[number % len(self._batches)]


@dataclass(frozen=True)
class Turn:
    """What a contestant trains on, and what it logs."""

    num_scalars: int
    batches: Batches
    folder: Path
    scalars: dict[str, float] = field(default_factory=dict)

    @property
    def loader(self) -> DataLoader[Any]:
        """Return the same loader for all."""
        return DataLoader(self.batches, batch_size=None)


def bare_ddp(turn: Turn) -> None:
    """Train with DDP and nothing else."""
    bare_loop(DistributedDataParallel(mlp()), turn.folder)(turn.loader)


def ours(turn: Turn) -> None:
    """Train with a Trainer, all default hooks and writers."""
    from distrain import Trainer

    model = mlp()
    optimizer = new_optimizer(model)
    hooks = default_hooks(optimizer, turn.folder)
    if turn.num_scalars > 1:  # one is the loss
        hooks["scalars"] = PutsScalars(turn.scalars)
    Trainer(model, optimizer, turn.loader, hooks=hooks).train(0, turn.batches.max_iter)


def with_accelerate(turn: Turn) -> None:
    """Train with an Accelerator; it reduces and tracks every 20 steps."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=turn.folder)
    accelerator.init_trackers("run")
    model = mlp()
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    sums: dict[str, Any] = {}
    for step, (inputs, labels) in enumerate(turn.loader):
        loss = model(inputs, labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in {"loss": loss.detach(), **turn.scalars}.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % WINDOW == WINDOW - 1:
            packed = torch.tensor([float(value) / WINDOW for value in sums.values()])
            means = accelerator.reduce(packed, "mean").tolist()
            accelerator.log(dict(zip(sums, means, strict=True)), step=step)
            sums = {}
    for tracker in accelerator.trackers:  # end_training would end the process group too
        tracker.finish()


def with_torchtnt(turn: Turn) -> None:
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
            self.logger = TensorBoardLogger(str(turn.folder))
            self.sums: dict[str, Any] = {}

        def train_step(self, state: State, data: Any) -> None:
            loss = self.module(*data)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, value in {"loss": loss.detach(), **turn.scalars}.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            step = self.train_progress.num_steps_completed
            if step % WINDOW == WINDOW - 1:
                packed = torch.tensor([float(value) / WINDOW for value in self.sums.values()])
                dist.all_reduce(packed)
                means = (packed / dist.get_world_size()).tolist()
                self.logger.log_dict(dict(zip(self.sums, means, strict=True)), step)
                self.sums = {}

    train(Unit(), turn.loader, max_epochs=1)


def with_mmengine(turn: Turn) -> None:
    """Train with a Runner; it logs the values of rank 0 only."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, inputs: Tensor, labels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            values = {name: torch.tensor(value) for name, value in turn.scalars.items()}
            return {"loss": self.net(inputs, labels), **values}

    model = Model()
    Runner(
        model=model,
        work_dir=str(turn.folder),
        train_dataloader=turn.loader,
        train_cfg={"by_epoch": False, "max_iters": turn.batches.max_iter},
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


def with_lightning(turn: Turn) -> None:
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
            self.log_dict({"loss": loss, **turn.scalars}, sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return new_optimizer(self)

    lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[LightningEnvironment()],
        max_steps=turn.batches.max_iter,
        logger=TensorBoardLogger(turn.folder),
        log_every_n_steps=WINDOW,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), turn.loader)


def with_transformers(turn: Turn) -> None:
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
            return ({"inputs": x, "labels": y} for x, y in turn.batches)

    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Named(), batch_size=None)

    model = Model()
    arguments = TrainingArguments(
        output_dir=str(turn.folder),
        max_steps=turn.batches.max_iter,
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


TRAIN: dict[str, Callable[[Turn], None]] = {
    "bare DDP": bare_ddp,
    "distrain": ours,
    "accelerate": with_accelerate,
    "torchtnt": with_torchtnt,
    "mmengine": with_mmengine,
    "lightning": with_lightning,
    "transformers": with_transformers,
}


def be_rank(name: str, rank: int, meeting: str, pipe: Connection) -> None:
    """Be one rank of a contestant: train each time that the pipe says how."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", NODE_RANK="0"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", GLOO_SOCKET_IFNAME="lo")
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # the peers' own lines
    if "PEERS_STDERR" not in os.environ:
        os.dup2(silence, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    while (order := pipe.recv()) is not None:
        num_scalars, steps = order
        with tempfile.TemporaryDirectory() as folder:
            batches = Batches(steps)
            scalars = dict(new_scalars(num_scalars if num_scalars > 1 else 0, "float"))
            try:
                TRAIN[name](Turn(num_scalars, batches, Path(folder), scalars))
                pipe.send(batches.cost)
            except BaseException as error:
                pipe.send(f"{type(error).__name__}: {error}")
                raise
    dist.destroy_process_group()


class Contestant:
    """Two processes that train when they are told to."""

    def __init__(self, name: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipes = []
        self._ranks = []
        for rank in range(2):
            here, there = context.Pipe()
            arguments = (name, rank, f"{folder}/{name.replace(' ', '_')}", there)
            process = context.Process(target=be_rank, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._ranks.append(process)

    def train(self, num_scalars: int, steps: int) -> Cost | str:
        """Return the cost of a step: CPU of both ranks together, wall of the slower; or why not."""
        for pipe in self._pipes:
            pipe.send((num_scalars, steps))
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(120):
                return "no answer in 120 s"
            answers.append(pipe.recv())
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            return failed[0]
        return Cost(sum(a.cpu_s for a in answers), max(a.wall_s for a in answers))

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._ranks, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", help="names of contestants besides bare DDP")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = [name for name, module in REQUIRES.items() if importlib.util.find_spec(module)]
    if options.only:
        found = [name for name in found if name in ("bare DDP", *options.only)]
    with tempfile.TemporaryDirectory() as folder:
        contestants = [Contestant(name, folder) for name in found]
        try:
            for num_scalars in (1, 30):
                play(contestants, num_scalars, rounds=options.rounds, steps=options.steps)
        finally:
            for contestant in contestants:
                contestant.close()
    if missing := REQUIRES.keys() - set(found):
        print(f"not installed or not asked for: {', '.join(sorted(missing))}")


def play(contestants: list[Contestant], num_scalars: int, *, rounds: int, steps: int) -> None:
    """Let all train in turns and print the table; one round before is not counted."""
    costs: dict[str, list[Cost]] = {c.name: [] for c in contestants}
    for number in range(-1, rounds):
        for contestant in list(contestants):
            cost = contestant.train(num_scalars, steps)
            if isinstance(cost, str):
                print(f"{contestant.name} is left out: {cost}", file=sys.stderr)
                contestants.remove(contestant)
                del costs[contestant.name]
            elif number >= 0:
                costs[contestant.name].append(cost)
    bare = costs["bare DDP"]
    rows = []
    for name, own in costs.items():
        cpu = sorted(a.cpu_s / b.cpu_s for a, b in zip(own, bare, strict=True))
        wall = sorted(a.wall_s / b.wall_s for a, b in zip(own, bare, strict=True))
        version = importlib.metadata.version(REQUIRES[name]) if name != "distrain" else ""
        rows.append(
            [
                f"{name} {version}".strip(),
                f"{estimate(c.cpu_s * 1e6 for c in own).median:.0f}",
                f"{estimate(cpu).median:.2f} ({cpu[0]:.2f}..{cpu[-1]:.2f})",
                f"{estimate(c.wall_s * 1e6 for c in own).median:.0f}",
                f"{estimate(wall).median:.2f} ({wall[0]:.2f}..{wall[-1]:.2f})",
            ]
        )
    print_table(
        f"Two gloo ranks, MLP 64-64-10, {num_scalars} scalars a step "
        f"({rounds} rounds of {steps} steps; median and range)",
        ["", "CPU us a step, both ranks", "CPU over bare", "wall us a step", "wall over bare"],
        rows,
    )


if __name__ == "__main__":
    main()
