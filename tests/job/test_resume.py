"""A run that was interrupted is the run that was not, to the last bit; and what else equals it.

Each training here is `distrain.job.training.train`, which every rank runs, in the ranks of a fork.
"""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from checkpoint_cases import identical
from ranks import run_ranks
from resume_cases import (
    BATCH,
    ITERS,
    SCHEDULES,
    SGD,
    Images,
    Net,
    conf_of,
    differing,
    interrupted_and_straight,
    state_of,
    train,
)
from torch.nn.parallel import DistributedDataParallel

import distrain.hooks  # noqa: F401 - here once, and not in every fork
from distrain import HookBase, schedule
from distrain.checkpoint import staging  # noqa: F401
from distrain.checkpoint.store import CheckpointStore
from distrain.data.samplers import Shuffled
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.errors import ExitCode
from distrain.job import training

pytestmark = pytest.mark.ranks


class Early(HookBase):
    """Asks for an early stop after an iteration."""

    def __init__(self, after):
        self.after = after

    def after_step(self):
        if self.trainer.iter_done == self.after:
            self.trainer.storage.early_stop = True


ADAMW = {"target": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1}


def stopped_early_and_again(rank, folder):
    hooks = {"early": {"_target_": f"{__name__}.Early", "after": 6}}
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
    assert ours == {f"distrain.schedule.{name}" for name in schedule.__all__}


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
    monkeypatch.setattr("distrain.job.resume.restore_random_states", lambda states: None)
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
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), **plain_sgd())
    dataset, order = Images(noise=0.0), Shuffled(29, seed=3)
    for iteration in range(PLAIN_ITERS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * iteration / PLAIN_ITERS))
        indices = order.at(iteration * BATCH, BATCH)[1].reshape(2, -1)[rank].tolist()
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
