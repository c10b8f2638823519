"""The learning rate ahead is the one that the run will use."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as theirs

from distrain.schedule.preview import schedule_values
from distrain.schedule.schedules import (
    OneCycleLR,
    WarmupCosineLR,
    WarmupExponentialLR,
    WarmupMultiStepLR,
)

BUILD = {
    "cosine": partial(WarmupCosineLR, max_iters=12, warmup_iters=4),
    "steps": partial(WarmupMultiStepLR, milestones=[3, 7], warmup_iters=4),
    "cycle": partial(OneCycleLR, max_iters=12),
    "exponential": partial(theirs.ExponentialLR, gamma=0.9),
}


def sgd(*rates):
    """Return SGD with one parameter a group."""
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in rates])


def run(schedule, count):
    """Return the rates of the first group in that many iterations."""
    rates = []
    for _ in range(count):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


@settings(deadline=None)
@given(st.sampled_from(sorted(BUILD)), st.lists(st.integers(0, 40), max_size=6))
def test_values_ahead_are_those_of_the_run(name, iterations):
    optimizer = sgd(0.1, 0.2, 0.2)
    before = copy.deepcopy(optimizer.state_dict())
    values = schedule_values(BUILD[name], optimizer, iterations)
    assert optimizer.state_dict() == before
    rates = run(BUILD[name](sgd(0.1)), 41)
    assert values == [rates[t] for t in iterations]


def test_values_ahead_of_torchs_schedules():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.9)

    def one_cycle(o):
        return theirs.OneCycleLR(o, 0.5, 20)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = schedule_values(one_cycle, optimizer, [19, 0, 7], max_steps=10)
    assert math.isnan(values[0])
    assert values[1:] == pytest.approx([0.02, run(one_cycle(optimizer), 8)[7]])
    plateau = schedule_values(theirs.ReduceLROnPlateau, sgd(0.5), [0, 1])
    assert plateau[0] == 0.5
    assert math.isnan(plateau[1])


def test_values_ahead_start_at_the_initial_rate_and_choose_the_group():
    optimizer = sgd(1.0, 2.0)
    run(WarmupExponentialLR(optimizer, 4, warmup_iters=0), 3)
    build = partial(theirs.ExponentialLR, gamma=0.5)
    assert schedule_values(build, optimizer, [0, 1, 2]) == [1.0, 0.5, 0.25]
    assert schedule_values(build, optimizer, [1], group=1) == [1.0]
