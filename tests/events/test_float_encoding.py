import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrain.events.float_encoding import ordered, split_rank, unordered, with_rank

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
