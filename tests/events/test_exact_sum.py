"""Sums over ranks that do not depend on the order of the additions."""

import itertools
from functools import reduce

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distrain.events.exact_sum import join, split


def test_halves_by_hand():
    assert split(np.array([1 + 2.0**-40, -3.0])).tolist() == [1.0, -3.0, 2.0**-40, 0.0]
    assert split(np.array([np.inf, -np.inf])).tolist() == [np.inf, -np.inf, 0.0, 0.0]
    assert np.isnan(split(np.array([np.nan]))).tolist() == [True, False]


def test_halves_join_to_the_same_bits():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000) * 10.0 ** rng.integers(-300, 300, 1000)
    assert join(split(values)).tobytes() == values.tobytes()


def test_any_order_gives_the_same_sum():
    rng = np.random.default_rng(1)
    ranks = rng.standard_normal((4, 50)) * 10.0 ** rng.integers(-3, 3, (4, 50))
    orders = list(itertools.permutations(range(4)))
    plain = {reduce(np.add, ranks[list(order)]).tobytes() for order in orders}
    exact = {
        join(reduce(np.add, [split(rank) for rank in ranks[list(order)]])).tobytes()
        for order in orders
    }
    assert len(plain) > 1, "the control"
    assert len(exact) == 1


def sums_of_two_lengths(rank, exact):
    values = np.random.default_rng(rank).random(64)
    sums = []
    for num in (17, 64):
        vector = torch.from_numpy(split(values[:num]) if exact else values[:num].copy())
        dist.all_reduce(vector)
        sums.append((join(vector.numpy()) if exact else vector.numpy())[:17].tobytes())
    return sums[0] == sums[1]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [3, 4])
def test_the_vectors_length_does_not_show(world_size):
    assert all(run_ranks(sums_of_two_lengths, world_size, True))
    assert not any(run_ranks(sums_of_two_lengths, world_size, False)), "the control"
