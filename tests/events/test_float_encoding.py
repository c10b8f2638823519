"""Integers of the order of floats; sums over ranks that do not depend on the order of additions."""

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from distrain.events.float_encoding import join, ordered, split, split_rank, unordered, with_rank

floats = st.floats(allow_nan=False)


@given(st.lists(floats, min_size=1))
def test_integers_have_the_order_of_the_floats(values):
    array = np.array(values)
    assert np.array_equal(unordered(ordered(array)), array)
    assert ordered(array).argmax() == array.argmax() or array.max() in (
        array[ordered(array).argmax()],
    )


def test_nan_is_the_largest_of_either_sign():
    keys = ordered(np.array([math.inf, math.nan, -math.nan, 1.0]))
    assert keys[1] == keys[2] == keys.max() > keys[0]


@given(st.floats(width=32, allow_nan=False), st.integers(0, 4095))
def test_rank_rides_along(value, rank):
    keys, negatives = with_rank(np.array([value]), rank)
    assert split_rank(keys[0]) == (value, rank)
    assert split_rank(negatives[0]) == (-value, rank)


def test_of_equal_values_the_lowest_rank_wins():
    keys = [with_rank(np.array([zero]), rank)[0, 0] for rank, zero in ((3, 0.0), (1, -0.0))]
    assert split_rank(max(keys)) == (0.0, 1)


def test_a_larger_value_wins_over_any_rank():
    keys = [with_rank(np.array([v]), r)[0, 0] for v, r in [(-1.0, 0), (-0.5, 4000), (-2.0, 1)]]
    assert split_rank(max(keys)) == (-0.5, 4000)


def test_with_a_rank_nan_is_the_largest_too():
    keys, negatives = with_rank(np.array([math.inf, -math.nan, math.nan]), 5)
    assert keys[1] == keys[2] > keys[0]
    assert negatives[1] == negatives[2] > negatives[0]
    value, rank = split_rank(keys[1])
    assert math.isnan(value)
    assert rank == 5


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
