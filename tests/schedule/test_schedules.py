"""Schedules against numbers worked by hand and against torch's own where the formulas meet."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as theirs

import distrain.schedule as ours
from distrain.errors import ConfigError
from distrain.hooks import LRScheduler
from distrain.schedule.schedules import (
    OneCycleLR,
    WarmupConstantLR,
    WarmupCosineLR,
    WarmupExponentialLR,
    WarmupLinearLR,
    WarmupMultiStepLR,
    WarmupPolynomialLR,
    WarmupStableDecayLR,
)

NO_WARMUP = {"warmup_iters": 0}
SCHEDULES = {
    "WarmupConstantLR": {},
    "WarmupCosineLR": {"max_iters": 12},
    "WarmupCosineRestartsLR": {"cycle_iters": 2, "cycle_factor": 2, "restart_factor": 0.5},
    "WarmupExponentialLR": {"max_iters": 12},
    "WarmupLinearLR": {"max_iters": 12, "final_factor": 0.1},
    "WarmupMultiStepLR": {"milestones": [3, 7]},
    "WarmupPolynomialLR": {"max_iters": 12},
    "WarmupStableDecayLR": {"max_iters": 12, "decay_iters": 5, "decay_method": "sqrt"},
    "OneCycleLR": {"max_iters": 12},
}


def sgd(*rates):
    """Return SGD with one parameter a group."""
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in rates or (1.0,)])


def make(name, optimizer, **changes):
    """Return the schedule of SCHEDULES, warming up over 4 iterations if it does so at all."""
    warmup = {} if name == "OneCycleLR" else {"warmup_iters": 4, "warmup_factor": 0.1}
    return getattr(ours, name)(optimizer, **{**warmup, **SCHEDULES[name], **changes})


def run(schedule, count):
    """Return the rates of the first group in that many iterations."""
    rates = []
    for _ in range(count):
        rates.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def test_multi_step_by_hand():
    schedule = WarmupMultiStepLR(sgd(5.0), [10, 15, 20], 0.1, 0.001, 5)
    # linear: 0.001 * (1 - t / 5) + t / 5
    expected = (
        [0.005, 1.004, 2.003, 3.002, 4.001] + [5.0] * 5 + [0.5] * 5 + [0.05] * 5 + [0.005] * 5
    )
    assert run(schedule, 25) == pytest.approx(expected, rel=1e-12)


def test_constant_warmup_and_the_boundary_of_a_milestone_by_hand():
    schedule = WarmupMultiStepLR(sgd(2.0), [3], 0.5, 0.25, 2, "constant")
    assert run(schedule, 5) == [0.5, 0.5, 2.0, 1.0, 1.0]
    during = WarmupMultiStepLR(sgd(1.0), [1], 0.5, 0.5, 2)
    assert run(during, 3) == [0.5, 0.375, 0.5]  # a milestone within the warm-up counts


def test_cosine_by_hand():
    schedule = WarmupCosineLR(sgd(5.0), 30, 0.001, 5)
    cosine = [2.5 * (1 + math.cos(math.pi * t / 30)) for t in range(30)]
    linear = [0.001, 0.2008, 0.4006, 0.6004, 0.8002]
    expected = [w * c for w, c in zip(linear + [1.0] * 25, cosine, strict=True)]
    got = run(schedule, 30)
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[:3] == pytest.approx([0.005, 1.00124981, 1.98111482], rel=1e-6)
    assert schedule.get_last_lr() == [0.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (lambda o: WarmupConstantLR(o, **NO_WARMUP), [1, 1, 1]),
        (lambda o: WarmupConstantLR(o, warmup_factor=0.1, warmup_iters=4),
         [0.1, 0.325, 0.55, 0.775, 1, 1]),
        (lambda o: WarmupMultiStepLR(o, [2, 4], **NO_WARMUP), [1, 1, 0.1, 0.1, 0.01]),
        (lambda o: WarmupMultiStepLR(o, [2, 2], **NO_WARMUP), [1, 1, 0.01]),
        (lambda o: WarmupMultiStepLR(o, [], **NO_WARMUP), [1, 1]),
        (lambda o: WarmupCosineLR(o, 4, **NO_WARMUP), [1, 0.853553, 0.5, 0.146447, 0]),
        (lambda o: WarmupCosineLR(o, 4, final_factor=0.2, **NO_WARMUP),
         [1, 0.882843, 0.6, 0.317157, 0.2]),
        (lambda o: ours.WarmupCosineRestartsLR(o, 2, cycle_factor=2, restart_factor=0.5,
                                               **NO_WARMUP),
         [1, 0.5, 0.5, 0.426777, 0.25, 0.073223, 0.25]),
        (lambda o: WarmupLinearLR(o, 4, final_factor=0.2, **NO_WARMUP),
         [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (lambda o: WarmupLinearLR(o, 4, **NO_WARMUP), [1, 0.75, 0.5, 0.25, 0, 0]),
        (lambda o: WarmupPolynomialLR(o, 4, power=2, **NO_WARMUP),
         [1, 0.5625, 0.25, 0.0625, 0, 0]),
        (lambda o: WarmupExponentialLR(o, 4, **NO_WARMUP),
         [1, 0.316228, 0.1, 0.0316228, 0.01, 0.00316228]),
        (lambda o: WarmupStableDecayLR(o, 6, decay_iters=4, **NO_WARMUP),
         [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (lambda o: WarmupStableDecayLR(o, 6, decay_iters=4, decay_method="sqrt", **NO_WARMUP),
         [1, 1, 1, 0.5, 0.292893, 0.133975, 0]),
        (lambda o: WarmupStableDecayLR(o, 4, decay_iters=4, decay_method="cosine",
                                       final_factor=0.5, **NO_WARMUP),
         [1, 0.926777, 0.75, 0.573223, 0.5, 0.5]),
        (lambda o: OneCycleLR(o, 9, rise=1 / 3, method="linear", start_factor=0.2, final_factor=0),
         [0.2, 0.6, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]),
        (lambda o: OneCycleLR(o, 3, rise=0, method="linear", final_factor=0.5), [1, 0.75, 0.5]),
        (lambda o: OneCycleLR(o, 1, final_factor=0.5), [0.5, 0.5]),
    ],
)  # fmt: skip
def test_the_examples_of_the_docstrings(schedule, expected):
    assert run(schedule(sgd()), len(expected)) == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("mine", "torchs"),
    [
        (lambda o: WarmupMultiStepLR(o, [3, 7], 0.5, **NO_WARMUP),
         lambda o: theirs.MultiStepLR(o, [3, 7], 0.5)),
        (lambda o: WarmupCosineLR(o, 20, **NO_WARMUP), lambda o: theirs.CosineAnnealingLR(o, 20)),
        (lambda o: WarmupCosineLR(o, 20, final_factor=0.1, **NO_WARMUP),
         lambda o: theirs.LambdaLR(o, lambda t: 0.55 + 0.45 * math.cos(math.pi * t / 20))),
        (lambda o: ours.WarmupCosineRestartsLR(o, 3, cycle_factor=2, **NO_WARMUP),
         lambda o: theirs.CosineAnnealingWarmRestarts(o, 3, 2)),
        (lambda o: ours.WarmupCosineRestartsLR(o, 3, **NO_WARMUP),
         lambda o: theirs.CosineAnnealingWarmRestarts(o, 3)),
        (lambda o: WarmupLinearLR(o, 20, final_factor=0.1, **NO_WARMUP),
         lambda o: theirs.LinearLR(o, 1.0, 0.1, 20)),
        (lambda o: WarmupConstantLR(o, 0.1, 5), lambda o: theirs.LinearLR(o, 0.1, 1.0, 5)),
        (lambda o: WarmupConstantLR(o, 0.1, 5, "constant"), lambda o: theirs.ConstantLR(o, 0.1, 5)),
        (lambda o: WarmupPolynomialLR(o, 20, **NO_WARMUP),
         lambda o: theirs.PolynomialLR(o, 20, 0.9)),
        (lambda o: WarmupExponentialLR(o, 20, **NO_WARMUP),
         lambda o: theirs.ExponentialLR(o, 0.01 ** (1 / 20))),
        (lambda o: OneCycleLR(o, 20),
         lambda o: theirs.OneCycleLR(o, [0.5, 0.25], 20, cycle_momentum=False)),
        (lambda o: OneCycleLR(o, 20, rise=0.5, method="linear"),
         lambda o: theirs.OneCycleLR(o, [0.5, 0.25], 20, pct_start=0.5, anneal_strategy="linear",
                                     cycle_momentum=False)),
    ],
)  # fmt: skip
def test_equal_to_torchs_own(mine, torchs):
    a, b = mine(sgd(0.5, 0.25)), torchs(sgd(0.5, 0.25))
    for t in range(20):
        assert a.last_epoch == b.last_epoch == t
        assert a.get_last_lr() == pytest.approx(b.get_last_lr(), rel=1e-9, abs=1e-12)
        for schedule in (a, b):
            schedule.optimizer.step()
            schedule.step()


def test_the_formula_read_from_left_to_right_gives_the_same_bits():
    schedule = WarmupCosineLR(sgd(0.3), 97, 0.01, 13)
    for t, rate in enumerate(run(schedule, 97)):
        a = t / 13
        warmup = 1 if t >= 13 else 0.01 * (1 - a) + a
        assert rate == 0.3 * warmup * 0.5 * (1 + math.cos(math.pi * t / 97))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_goes_on_as_if_nothing_had_happened(name):
    straight = run(make(name, sgd()), 12)
    first = make(name, sgd())
    assert run(first, 5) == straight[:5]
    saved = pickle.loads(pickle.dumps([first.state_dict(), first.optimizer.state_dict()]))
    assert saved[0] == {"last_epoch": 5}
    second = make(name, sgd())
    second.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    assert second.get_last_lr() == [straight[5]]
    assert run(second, 7) == straight[5:]
    # torch's other way: the optimizer first, then the index of the update before
    optimizer = sgd()
    optimizer.load_state_dict(saved[1])
    assert run(make(name, optimizer, last_epoch=4), 7) == straight[5:]


@pytest.mark.parametrize("name", [n for n, kw in SCHEDULES.items() if "max_iters" in kw])
def test_a_longer_horizon_after_resuming_is_the_longer_schedule(name):
    short, long = make(name, sgd()), make(name, sgd(), max_iters=24)
    expected = run(long, 24)
    run(short, 5)
    resumed = make(name, sgd(), max_iters=24)
    resumed.load_state_dict(short.state_dict())
    resumed.optimizer.load_state_dict(short.optimizer.state_dict())
    resumed.apply()
    assert run(resumed, 19) == expected[5:]


def test_loading_leaves_the_optimizer_alone_so_that_sequences_resume():
    def sequence():
        optimizer = sgd()
        warm = WarmupConstantLR(optimizer, 0.1, 4)
        return theirs.SequentialLR(optimizer, [warm, WarmupCosineLR(optimizer, 8, 0.0, 0)], [4])

    cosine = [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(6)]
    straight = run(sequence(), 10)
    assert straight == pytest.approx([0.1, 0.325, 0.55, 0.775, *cosine])
    for k in (0, 2, 3, 4, 5):
        first, second = sequence(), sequence()
        run(first, k)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert run(second, 10 - k) == straight[k:]


def test_rates_that_are_tensors_are_filled_in_place():
    optimizer = sgd(torch.tensor(0.5), torch.tensor(0.25))
    before = [group["lr"] for group in optimizer.param_groups]
    schedule = WarmupMultiStepLR(optimizer, [2], 0.5, warmup_iters=0)
    run(schedule, 2)
    assert [group["lr"] is old for group, old in zip(optimizer.param_groups, before, strict=True)]
    assert [lr.item() for lr in before] == [0.25, 0.125]
    assert schedule.get_last_lr() == [0.25, 0.125]
    assert all(type(lr) is float for lr in schedule.get_last_lr() + schedule.base_lrs)


def test_groups_keep_their_own_base_rates():
    schedule = WarmupLinearLR(sgd(1.0, 10.0), 4, **NO_WARMUP)
    schedule.step()
    assert [group["lr"] for group in schedule.optimizer.param_groups] == [0.75, 7.5]
    assert schedule.lr_at(3) == [0.25, 2.5]
    assert schedule.last_epoch == 1
    schedule.step(2)
    assert schedule.get_last_lr() == [0.5, 5.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda o: WarmupMultiStepLR(o, [5, 3, 9]), r"milestones=\[5, 3, 9\]: expected ascending"),
        (lambda o: WarmupMultiStepLR(o, "357"), "milestones=357: expected a list"),
        (lambda o: WarmupMultiStepLR(o, [0.5]), "milestones=0.5: expected an integer"),
        (lambda o: WarmupMultiStepLR(o, [5], gamma="0.1"), "gamma='0.1': expected a finite number"),
        (lambda o: WarmupCosineLR(o, 0), "max_iters=0: expected an integer >= 1"),
        (lambda o: WarmupCosineLR(o, True), "max_iters=true"),
        (lambda o: WarmupCosineLR(o, 9, warmup_method="exp"),
         "warmup_method=exp: expected one of constant, linear"),
        (lambda o: WarmupCosineLR(o, 9, warmup_iters=-1), "warmup_iters=-1"),
        (lambda o: WarmupCosineLR(o, 9, warmup_factor=-1), "warmup_factor=-1"),
        (lambda o: WarmupExponentialLR(o, 9, final_factor=0), "final_factor=0: expected a finite"),
        (lambda o: WarmupPolynomialLR(o, 9, power=0), "power=0: expected a finite number"),
        (lambda o: WarmupStableDecayLR(o, 9, decay_iters=10), "decay_iters=10: expected at most"),
        (lambda o: WarmupStableDecayLR(o, 9, decay_iters=3, decay_method="x"),
         "decay_method=x: expected one of cosine, linear, sqrt"),
        (lambda o: OneCycleLR(o, 9, rise=1.0), "rise=1.0"),
        (lambda o: OneCycleLR(o, 9, method="cos"), "method=cos: expected one of cosine, linear"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key_the_value_and_what_is_allowed(build, message):
    with pytest.raises(ConfigError, match=message):
        build(sgd())


def test_names_are_the_schedules_that_can_be_built():
    assert set(ours.__all__) == {*SCHEDULES}


class NoReadBack(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor becomes a number of Python, which would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_reads_nothing_back_and_warns_of_nothing(name):
    schedule = make(name, sgd(torch.tensor(0.5)))
    with warnings.catch_warnings(), NoReadBack():
        warnings.simplefilter("error")
        schedule.step()
        schedule.step()


def test_the_hook_takes_a_schedule_alone_or_behind_its_optimizer():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = WarmupCosineLR(optimizer, 10)
    for hook in (
        LRScheduler(schedule),
        LRScheduler(schedule=schedule),
        LRScheduler(optimizer, schedule),
        LRScheduler(optimizer, scheduler=schedule),
        LRScheduler(optimizer=optimizer, scheduler=schedule),
        LRScheduler(scheduler=schedule),
    ):
        assert [*hook.schedules.values()] == [schedule]


def test_the_hook_refuses_what_it_cannot_step():
    optimizer, other = (
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2)
    )
    schedule = WarmupCosineLR(optimizer, 10)
    with pytest.raises(ConfigError, match="expected the optimizer of the scheduler"):
        LRScheduler(other, schedule)
    for arguments in ((), (optimizer,), (schedule, schedule)):
        with pytest.raises(ConfigError, match="LRScheduler: expected one schedule"):
            LRScheduler(*arguments)
    with pytest.raises(ConfigError, match="hooks.schedule.metric=null: expected a metric for Red"):
        LRScheduler(optimizer, theirs.ReduceLROnPlateau(optimizer))
    with pytest.raises(ConfigError, match="metric=loss: expected null for WarmupCosineLR; only"):
        LRScheduler(schedule, metric="loss")
