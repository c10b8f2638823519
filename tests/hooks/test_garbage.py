"""When Python collects its garbage, as its own callbacks tell it."""

import gc

import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import Trainer
from distrain.errors import ConfigError
from distrain.hooks import CallbackHook, GarbageCollector


@pytest.fixture(autouse=True)
def nothing_is_frozen():
    gc.unfreeze()


def litter():
    """Make 1,000 objects in cycles: more than a collection of the youngest waits for."""
    for _ in range(1000):
        one = []
        one.append(one)


class Model(nn.Linear):
    def forward(self, batch):
        litter()
        return super().forward(batch).sum()


def collections(rank, *hooks, steps=7):
    """Return the iterations in which garbage was collected, by generation."""
    seen = []
    model = Model(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, [torch.ones(1, 2)], hooks=hooks)

    def note(phase, info):
        if phase == "start" and trainer.storage.iter == trainer.iter:
            seen.append((trainer.iter, info["generation"]))

    begin = CallbackHook(before_step=lambda t: t.iter or gc.callbacks.append(note))
    trainer.register_hooks({"begin": begin})
    was_frozen = gc.get_freeze_count()
    try:
        trainer.train(0, steps)
    finally:
        gc.callbacks.remove(note)
    return seen, gc.isenabled(), gc.get_freeze_count() == was_frozen


@pytest.mark.ranks
def test_all_ranks_collect_in_the_same_iterations_and_in_no_other():
    results = run_ranks(collections, 2, GarbageCollector(3))
    assert results == [([(2, 2), (5, 2)], True, True)] * 2


def test_without_it_python_chooses_the_moment():
    seen, _, _ = collections(0)
    assert len(seen) > 5


def test_it_comes_back_after_a_failure():
    def fail(trainer):
        raise KeyError

    with pytest.raises(KeyError):
        collections(0, GarbageCollector(3), CallbackHook(after_step=fail))
    assert gc.isenabled()


def test_who_had_it_off_keeps_it_off():
    gc.disable()
    try:
        assert collections(0, GarbageCollector(3))[1] is False
    finally:
        gc.enable()


def test_mistakes():
    with pytest.raises(ConfigError, match="period=0: expected an integer >= 1"):
        GarbageCollector(0)
