import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrain.ordered import ordered, split_rank, unordered, with_rank

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
    [key] = with_rank(np.array([value]), rank).tolist()
    assert split_rank(key) == (value, rank)


def test_of_equal_values_the_lowest_rank_wins():
    keys = [int(with_rank(np.array([2.5]), rank)[0]) for rank in (3, 1, 2)]
    assert split_rank(max(keys)) == (2.5, 1)


def test_a_larger_value_wins_over_any_rank():
    keys = [int(with_rank(np.array([v]), r)[0]) for v, r in [(-1.0, 0), (-0.5, 4000), (-2.0, 1)]]
    assert split_rank(max(keys)) == (-0.5, 4000)
