"""A run that was interrupted is the run that was not, to the last bit; and what else equals it.

All trainings here are `distrain.job.training.train`, what every rank does, in the ranks of one fork.
"""

import contextlib
import gc
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_cases import identical
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distrain.hooks  # noqa: F401 - here once, and not in every fork
from distrain import HookBase, Trainer, get_event_storage
from distrain.checkpoint import staging  # noqa: F401
from distrain.checkpoint.format import CLOCK_PREFIXES
from distrain.checkpoint.store import CheckpointStore
from distrain.data.loader import SampleStream
from distrain.distributed.process_group import topology
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.errors import ExitCode
from distrain.job import training
from distrain.schedule import schedules as schedule

pytestmark = pytest.mark.ranks

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


class Early(HookBase):
    """Asks for an early stop after an iteration."""

    def __init__(self, after):
        self.after = after

    def after_step(self):
        if self.trainer.iter_done == self.after:
            self.trainer.storage.early_stop = True


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
]
SGD = {"target": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"target": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1}


def conf_of(
    *,
    iters=ITERS,
    batch_size=BATCH,
    workers=0,
    optim=SGD,
    schedule=SCHEDULES[0],
    model=None,
    noise=0.1,
    num=29,
    period=SAVED,
    stop=None,
    hooks=None,
    init=None,
    **trainer,
):
    timer = {"_target_": "distrain.hooks.IterationTimer"}
    hooks = {
        **(hooks or {}),
        "timer": timer,
        "schedule": {"_target_": "distrain.hooks.LRScheduler"},
        "ledger": {"_target_": f"{HERE}.Ledger"},
        "checkpoint": {"_target_": "distrain.hooks.PeriodicCheckpointer", "period": period},
        "stop": stop and {"_target_": f"{HERE}.Stop", **stop},
    }
    return {
        "seed": 3,
        "resume": "auto",
        "checkpoint": {"background": False},
        "init": init or {},
        "model": {"_target_": f"{HERE}.Net", **(model or {})},
        "data": {
            "batch_size": batch_size,
            "workers": workers,
            "seed_samples": noise > 0,
            "train": {"_target_": f"{HERE}.Images", "noise": noise, "num": num},
            "eval": None,
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
        if name.startswith(CLOCK_PREFIXES):
            del state["histories"][name]
    return state


def interrupted_and_straight(rank, folder, settle=True, **settings):
    """Return both final states and ledgers as rank 0 has them, those of a stop half way too."""
    if not settle:
        Trainer._settle_buckets = lambda self: None
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


def stopped_early_and_again(rank, folder):
    hooks = {"early": {"_target_": f"{HERE}.Early", "after": 6}}
    code, seen = train(conf_of(hooks=hooks), folder)
    assert (code, sorted(seen)) == (ExitCode.FINISHED, list(range(8))), "a period has 4"
    code, seen = train(conf_of(hooks=hooks), folder)
    assert (code, seen) == (ExitCode.FINISHED, {}), "it had been finished"
    code, seen = train(conf_of(hooks=hooks, iters=ITERS + 4), folder)
    assert (code, sorted(seen)) == (ExitCode.FINISHED, list(range(8, ITERS + 4)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_stopped_early_trains_on_only_if_more_is_asked_for(tmp_path, world_size):
    run_ranks(stopped_early_and_again, world_size, tmp_path / "run")


CASES = [  # workers, accumulation, precision, optimizer
    (0, 1, "fp32", SGD),
    (2, 2, "bf16", ADAMW),
    (0, 2, "fp32", ADAMW),
    (2, 1, "bf16", SGD),
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("workers", "accumulation", "precision", "optim"), CASES)
def test_interrupted_is_straight_bit_for_bit(
    tmp_path, world_size, workers, accumulation, precision, optim
):
    rates = SCHEDULES[(world_size * 5 + 2 * workers + accumulation) % len(SCHEDULES)]
    broken, whole = run_ranks(
        interrupted_and_straight,
        world_size,
        tmp_path,
        workers=workers,
        accumulation=accumulation,
        precision=precision,
        optim=optim,
        schedule=rates,
    )[0]
    assert differing(broken, whole) == []
    assert [i for _, i in values(whole, "loss")] == list(range(ITERS))
    assert len(whole["rng"]["ranks"]) == world_size


MORE_HOOKS = {
    "ema": {"_target_": "distrain.hooks.EMA", "decay": 0.9, "evaluate": "instead"},
    "precise_bn": {"_target_": "distrain.hooks.PreciseBN", "num_iters": 2, "period": 3},
    "histograms": {"_target_": "distrain.hooks.Histograms", "windows": 1},
    "gc": {"_target_": "distrain.hooks.GarbageCollector", "period": 2},
}


@pytest.mark.parametrize("optim", ["LARS", "LAMB"])
def test_with_more_hooks_and_gradients_in_bf16_bit_for_bit(tmp_path, optim):
    optim = {"target": f"distrain.optim.large_batch.{optim}", "lr": 0.05, "weight_decay": 1e-3}
    settings = {"hooks": MORE_HOOKS, "optim": optim, "comm_hook": "bf16"}
    broken, whole = run_ranks(interrupted_and_straight, 3, tmp_path, **settings)[0]
    assert differing(broken, whole) == []
    assert whole["hooks"]["ema"]["updates"] == ITERS
    assert len(values(whole, "grad_norm")) == ITERS


def every_schedule(rank, folder):
    wrong = []
    for number, rates in enumerate(SCHEDULES):
        settings = {"schedule": rates, "optim": (SGD, ADAMW)[number % 2]}
        precision = "fp16" if number == 0 else "fp32"
        place = folder / str(number)
        both = interrupted_and_straight(rank, place, precision=precision, **settings)
        if rank == 0:
            wrong += [(rates, part) for part in differing(*both)]
            assert len({lr for lr, _ in values(both[1], "lr")}) > 1 or number == 0
    return wrong


def test_every_schedule_and_a_scaled_loss(tmp_path):
    assert run_ranks(every_schedule, 2, tmp_path) == [[], []]


def test_the_schedules_here_are_all_there_are():
    ours = {each["_target_"] for each in SCHEDULES if each["_target_"].startswith("distrain.")}
    assert ours == {f"distrain.schedule.{name}" for name in schedule.names()}


def values(state, name):
    history = state["histories"][name]
    return list(zip(history["values"].tolist(), history["iterations"].tolist(), strict=True))


def test_three_ranks_need_the_throw_away_step(tmp_path):
    """The control: without it DDP adds in another order after a resumption."""
    settings = {"model": {"width": 24, "norm": False}}
    for settle in (True, False):
        place = tmp_path / str(settle)
        both = run_ranks(interrupted_and_straight, 3, place, settle=settle, **settings)[0]
        assert bool(differing(*both)) is not settle


def test_without_the_random_states_a_resumed_run_differs(tmp_path, monkeypatch):
    """The control: dropout and what is drawn go on from another place."""
    monkeypatch.setattr("distrain.job.training.restore_random_states", lambda states: None)
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path)[0]
    assert {"model", "histories"} <= {*differing(broken, whole)}
    assert values(broken, "drawn") != values(whole, "drawn")


def stopped_and_straight(rank, folder):
    broken, whole = folder / "broken", folder / "whole"
    stop = {"after": 6, "crash": False}
    code, first = train(conf_of(stop=stop, period=None), broken)
    code_again, second = train(conf_of(period=None), broken)
    _, straight = train(conf_of(period=None), whole)
    assert (code, code_again) == (ExitCode.STOPPED, ExitCode.FINISHED)
    assert not first.keys() & second.keys()
    assert {**first, **second} == straight
    return max(first) + 1


@pytest.mark.usefixtures("short_windows")
def test_a_stop_saves_at_one_iteration_of_all_ranks(tmp_path):
    agreed, also_agreed = run_ranks(stopped_and_straight, 2, tmp_path)
    assert agreed == also_agreed
    assert 6 <= agreed < ITERS
    assert CheckpointStore(tmp_path / "broken" / "checkpoints").load(agreed)
    assert differing(state_of(tmp_path / "broken"), state_of(tmp_path / "whole")) == []


def one_leg(rank, run_dir, stop):
    conf = conf_of(
        model={"dropout": 0.0, "norm": False},
        stop=stop and {"after": stop, "crash": False},
        period=None,
        window=1,
    )
    sizes = []
    forward = Net.forward
    Net.forward = lambda self, x, *rest: (sizes.append(len(x)), forward(self, x, *rest))[1]
    return *train(conf, run_dir), max(sizes)


@pytest.mark.usefixtures("short_windows")
def test_another_number_of_ranks_sees_the_same_global_batches(tmp_path):
    whole = run_ranks(one_leg, 2, tmp_path / "whole", None)
    straight = global_batches(whole)
    seen, largest = {}, []
    for world_size, stop in ((2, 4), (1, 8), (4, None)):
        results = run_ranks(one_leg, world_size, tmp_path / "chain", stop)
        assert results[0][0] == (ExitCode.STOPPED if stop else ExitCode.FINISHED)
        leg = global_batches(results)
        assert not leg.keys() & seen.keys(), "an iteration was done twice"
        seen |= leg
        largest.append(max(size for *_, size in results))
    assert seen == straight
    assert largest == [6, 6, 3], "one rank takes its 12 samples in two forwards"
    chain, reference = (state_of(tmp_path / name) for name in ("chain", "whole"))
    losses, expected = (values(state, "loss") for state in (chain, reference))
    assert [i for _, i in losses] == [i for _, i in expected] == list(range(ITERS))
    np.testing.assert_allclose([v for v, _ in losses], [v for v, _ in expected], rtol=2e-6)
    for name, weight in reference["model"].items():
        torch.testing.assert_close(chain["model"][name], weight, rtol=1e-5, atol=1e-6)


def global_batches(results):
    batches = defaultdict(list)
    for _, ledger, _ in results:
        for iteration, samples in ledger.items():
            batches[iteration] += samples
    assert all(len(samples) == BATCH for samples in batches.values())
    return {iteration: sorted(samples) for iteration, samples in batches.items()}


def fifty_losses(rank, run_dir):
    conf = conf_of(
        iters=50, accumulation=2, model={"dropout": 0.0}, period=None, schedule=SCHEDULES[0]
    )
    train(conf, run_dir)
    return [value for value, _ in values(state_of(run_dir, 50), "loss")] if rank == 0 else []


def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path):
    one = run_ranks(fifty_losses, 1, tmp_path / "one")[0]
    two = run_ranks(fifty_losses, 2, tmp_path / "two")[0]
    assert len(one) == 50
    assert one[-1] < one[0] / 2, "it has learnt something"
    np.testing.assert_allclose(two, one, rtol=1e-4)
    np.testing.assert_allclose(two[:5], one[:5], rtol=1e-6)


PLAIN_ITERS = 200


def plain_ddp(rank):
    """The same training without distrain's trainer, schedule, loader, hooks or optimizer."""
    model = convert_sync_batchnorm(initial())
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), **plain_sgd())
    dataset, stream = Images(noise=0.0), SampleStream(29, batch_size=BATCH, seed=3)
    for iteration in range(PLAIN_ITERS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * iteration / PLAIN_ITERS))
        indices = stream.indices(iteration)[1].reshape(2, -1)[rank].tolist()
        images, labels, index, drawn = zip(*(dataset[i] for i in indices), strict=True)
        x, y = torch.stack(images), torch.stack(labels)
        ddp(x, y, torch.tensor(index), torch.tensor(drawn)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def plain_sgd():
    return {key: value for key, value in SGD.items() if key != "target"}


def initial():
    training.seed_everything(3, rank=0)
    return Net(dropout=0.0)


def ours_and_plain(rank, folder):
    conf = conf_of(
        iters=PLAIN_ITERS,
        model={"dropout": 0.0},
        noise=0.0,
        period=None,
        schedule={
            "_target_": "distrain.schedule.WarmupCosineLR",
            "max_iters": PLAIN_ITERS,
            "warmup_iters": 0,
        },
    )
    train(conf, folder)
    return plain_ddp(rank)


def test_two_hundred_iterations_equal_a_plain_ddp_script(tmp_path):
    for plain in run_ranks(ours_and_plain, 2, tmp_path):
        assert identical({**state_of(tmp_path, PLAIN_ITERS)["model"]}, {**plain})
