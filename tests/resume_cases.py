"""A run that crashes, continues and is compared with a straight one, in the ranks of a fork."""

import contextlib
import gc
import random
from types import SimpleNamespace

import numpy as np
import torch
from checkpoint_cases import identical
from torch import nn
from torch.nn import functional as F

import distrain.hooks  # noqa: F401 - here once, and not in every fork
from distrain import HookBase, get_event_storage
from distrain.checkpoint import staging  # noqa: F401
from distrain.checkpoint.store import CheckpointStore
from distrain.distributed.ddp import DDP
from distrain.distributed.ranks import topology
from distrain.distributed.strategy import Strategy
from distrain.errors import ExitCode
from distrain.job import training
from distrain.scalar_names import NONDETERMINISTIC_PREFIXES

HERE = __name__
BATCH, ITERS, SAVED, CRASH = 12, 12, 5, 8  # a period of 5: iteration 5 is mid-epoch (29 samples)
SEEN = []  # (sample, what it drew) of the forwards of one iteration
LEDGER = {}  # iteration -> what SEEN held after it


class Crashed(Exception):
    pass


class Images(torch.utils.data.Dataset):
    """Images of 6x6 pixels with noise that is drawn anew in each epoch."""

    def __init__(self, num=29, noise=0.1):
        g = torch.Generator().manual_seed(7)
        self.images = torch.randn(num, 1, 6, 6, generator=g)
        self.labels = torch.randint(0, 3, (num,), generator=g)
        self.noise = noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        drawn = torch.rand(()).item() + np.random.rand() + random.random() if self.noise else 0.0
        return self.images[i] + self.noise * drawn, self.labels[i], i, drawn


class Net(nn.Module):
    def __init__(self, dropout=0.2, norm=True, width=8):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(width * 16, 3),
        )

    def forward(self, x, y, index, drawn):
        SEEN.extend(zip(index.tolist(), drawn.tolist(), strict=True))
        return F.cross_entropy(self.net(x), y)


class Ledger(HookBase):
    """Keeps which samples an iteration saw, and puts random draws of this rank."""

    def before_step(self):
        SEEN.clear()

    def after_step(self):
        LEDGER[self.trainer.iter] = list(SEEN)
        drawn = random.random() + np.random.rand() + torch.rand(())
        get_event_storage().put_scalar("drawn", drawn)  # float32, as losses are


class Stop(HookBase):
    """Crashes, or asks for a stop, after an iteration."""

    order = 99

    def __init__(self, after, crash=True):
        self.after, self.crash = after, crash

    def after_step(self):
        if self.trainer.iter_done == self.after and self.crash:
            raise Crashed
        if self.trainer.iter_done == self.after:
            self.trainer.request_stop()


SCHEDULES = [
    {"_target_": "distrain.schedule.WarmupConstantLR"},
    {"_target_": "distrain.schedule.WarmupMultiStepLR", "milestones": [4, 7], "warmup_iters": 3},
    {"_target_": "distrain.schedule.WarmupCosineLR", "max_iters": ITERS, "warmup_iters": 6},
    {"_target_": "distrain.schedule.WarmupLinearLR", "max_iters": ITERS, "warmup_iters": 2},
    {"_target_": "distrain.schedule.WarmupPolynomialLR", "max_iters": ITERS, "warmup_iters": 2},
    {"_target_": "distrain.schedule.WarmupExponentialLR", "max_iters": ITERS, "warmup_iters": 2},
    {
        "_target_": "distrain.schedule.WarmupStableDecayLR",
        "max_iters": ITERS,
        "decay_iters": 8,
        "warmup_iters": 2,
    },
    {"_target_": "distrain.schedule.OneCycleLR", "max_iters": ITERS},
    {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": ITERS},
    {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9},
    {"_target_": "distrain.schedule.WarmupCosineRestartsLR", "cycle_iters": 3, "warmup_iters": 2},
    {
        "_target_": "torch.optim.lr_scheduler.SequentialLR",
        "milestones": [3, 7],
        "schedulers": [
            {"_target_": "torch.optim.lr_scheduler.LinearLR", "total_iters": 3},
            {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 4},
            {"_target_": "distrain.schedule.WarmupLinearLR", "max_iters": 9, "warmup_iters": 0},
        ],
    },
]
SGD = {"target": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def conf_of(
    *,
    iters=ITERS,
    batch_size=BATCH,
    workers=0,
    optim=SGD,
    schedule=SCHEDULES[0],
    model=None,
    step=None,
    noise=0.1,
    num=29,
    period=SAVED,
    stop=None,
    hooks=None,
    init=None,
    transforms=None,
    data=None,
    **trainer,
):
    timer = {"_target_": "distrain.hooks.IterationTimer"}
    hooks = {
        **(hooks or {}),
        "timer": timer,
        "schedule": {"_target_": "distrain.hooks.LRScheduler", **(hooks or {}).get("schedule", {})},
        "ledger": {"_target_": f"{HERE}.Ledger"},
        "checkpoint": {"_target_": "distrain.hooks.PeriodicCheckpointer", "period": period},
        "stop": stop and {"_target_": f"{HERE}.Stop", **stop},
    }
    return {
        "seed": 3,
        "resume": "auto",
        "checkpoint": {},
        "eval": {"metrics": {}},
        "init": init or {},
        "model": model if step else {"_target_": f"{HERE}.Net", **(model or {})},
        "step": step,
        "transforms": transforms or {},
        "data": {
            "batch_size": batch_size,
            "workers": workers,
            "seed_samples": noise > 0,
            "collate": None,
            "build_first": False,
            "loader": None,
            "sampler": None,
            "train": {"_target_": f"{HERE}.Images", "noise": noise, "num": num},
            "eval": None,
            **(data or {}),
        },
        "optim": optim,
        "schedule": schedule,
        "hooks": hooks,
        "trainer": {
            "max_iter": iters,
            "window": 4,
            "accumulation": 1,
            "sync_batchnorm": True,
            "float32_matmul": None,
            "deterministic": False,
            "strategy": "ddp",
            "ddp": {},
            "fsdp": {},
            "comm_hook": "none",
            "comm_options": {},
            **trainer,
        },
    }


def train(conf, run_dir):
    """Train as this rank of the group that is there; return the exit code and what was seen."""
    LEDGER.clear()
    training.process_group = lambda: contextlib.nullcontext(topology())
    # a full collection of what pytest has loaded takes longer than the training
    training.gc = SimpleNamespace(collect=int, freeze=gc.freeze, unfreeze=gc.unfreeze)
    code = None
    with contextlib.suppress(Crashed):
        code = training.train(conf, str(run_dir))
    return code, dict(LEDGER)


def state_of(run_dir, iteration=ITERS):
    """Return a checkpoint without what is measured on the clock."""
    state = CheckpointStore(run_dir / "checkpoints").load(iteration)
    for name in [*state["histories"]]:
        if name.startswith(NONDETERMINISTIC_PREFIXES):
            del state["histories"][name]
    return state


def interrupted_and_straight(rank, folder, settle=True, **settings):
    """Return both final states and ledgers as rank 0 has them, those of a stop half way too."""
    if not settle:
        DDP.warm_up = Strategy.warm_up
    broken, whole = folder / "broken", folder / "whole"
    code, first = train(conf_of(stop={"after": CRASH}, **settings), broken)
    assert code is None, "it should have crashed"
    assert sorted(first) == list(range(CRASH))
    torch.rand(rank + 3), random.random(), np.random.rand()  # a process that did other things
    code, second = train(conf_of(**settings), broken)
    assert code == ExitCode.FINISHED
    assert sorted(second) == list(range(SAVED, ITERS)), "it goes on from the checkpoint"
    code, straight = train(conf_of(**settings), whole)
    assert code == ExitCode.FINISHED
    assert {**first, **second} == straight, "samples, their order and what they drew"
    assert all(first[i] == second[i] for i in range(SAVED, CRASH))
    return (state_of(broken), state_of(whole)) if rank == 0 else None


def differing(broken, whole):
    assert broken.keys() == whole.keys()
    return [part for part in whole if not identical(broken[part], whole[part])]
