"""Batches of a number of tokens: what they hold, on any number of ranks, and resumed."""

from itertools import islice

import numpy as np
import pytest
import torch
from ranks import run_ranks
from resume_cases import differing, interrupted_and_straight
from torch.utils.data import TensorDataset

from distrain.data import TokenBudget, TrainLoader
from distrain.errors import ConfigError

LENGTHS = np.random.default_rng(0).integers(1, 30, 97)


def numbers():
    dataset = TensorDataset(torch.arange(97))
    dataset.lengths = LENGTHS
    return dataset


def budget(**keywords):
    return TokenBudget(numbers(), lengths="lengths", max_tokens=60, seed=3, **keywords)


@pytest.mark.parametrize("padded", [True, False])
def test_batches_keep_to_the_budget_and_have_each_sample_once_per_epoch(padded):
    order = budget(padded=padded)
    for epoch in (0, 5):
        batches = [
            order.samples(*order.at(i, 1))
            for i in range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)
        ]
        tokens = [LENGTHS[s].max() * len(s) if padded else LENGTHS[s].sum() for _, s in batches]
        assert max(tokens) <= 60
        assert np.mean(tokens) > 40
        assert sorted(np.concatenate([s for _, s in batches])) == [*range(97)]
        assert all((epochs == epoch).all() for epochs, _ in batches)


def test_the_smallest_example():
    for padded, sizes in ((True, [2, 1, 1]), (False, [3, 1])):
        order = TokenBudget(
            TensorDataset(torch.arange(4)),
            lengths=[1, 1, 2, 3],
            max_tokens=4,
            seed=0,
            padded=padded,
        )
        found = [len(order.samples(*order.at(i, 1))[1]) for i in range(order.per_epoch)]
        assert sorted(found, reverse=True) == sizes


def loaded(ranks, workers, accumulation):
    """Return the samples of iterations 5 to 9, of all ranks together."""
    parts = []
    for rank in range(ranks):
        loader = TrainLoader(
            numbers(),
            batch_size=12,
            rank=rank,
            world_size=ranks,
            workers=workers,
            accumulation=accumulation,
            sampler=budget(),
        )
        parts.append([batch[0] for batch in islice(loader.batches(5), 5 * accumulation)])
        loader.close()
    return [torch.cat(forward).tolist() for forward in zip(*parts, strict=True)]


def test_ranks_and_workers_share_one_order():
    assert loaded(1, 0, 1) == loaded(2, 0, 1) == loaded(3, 2, 1) == loaded(4, 0, 1)
    assert sum(loaded(1, 0, 1), []) == sum(loaded(2, 1, 3), []) == sum(loaded(3, 0, 4), [])


def test_interrupted_is_straight_bit_for_bit(tmp_path):
    sampler = {
        "_target_": "distrain.data.TokenBudget",
        "lengths": LENGTHS[:29].tolist(),
        "max_tokens": 60,
    }
    both = run_ranks(
        interrupted_and_straight,
        2,
        tmp_path,
        workers=2,
        batch_size=2,
        model={"norm": False},
        data={"sampler": sampler},
    )[0]
    assert differing(*both) == []


def test_a_sample_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="max_tokens=20: expected at least 29, the length of sam"):
        TokenBudget(numbers(), lengths="lengths", max_tokens=20, seed=0)
