import math

import numpy as np
import pytest

from distrain import HistoryBuffer


def test_values_keep_their_iterations():
    history = HistoryBuffer()
    for value, iteration in [(1.0, 0), (3.0, 2), (8.0, 5)]:
        history.update(value, iteration)
    assert history.values() == [(1.0, 0), (3.0, 2), (8.0, 5)]
    assert history.latest() == 8.0
    assert history.latest_iteration() == 5
    assert history.avg(2) == 5.5
    assert history.median(3) == 3.0
    assert history.median(2) == 5.5
    assert history.global_avg() == 4.0


def test_an_update_without_iteration_continues_the_count():
    history = HistoryBuffer()
    history.update(1.0, 7)
    history.update(2.0)
    assert history.values() == [(1.0, 7), (2.0, 8)]


def test_it_is_bounded_and_global_avg_counts_what_is_gone():
    history = HistoryBuffer(max_length=10)
    for i in range(100_000):
        history.update(float(i), i)
    assert [value for value, _ in history.values()] == [float(i) for i in range(99_990, 100_000)]
    assert history.global_avg() == 49_999.5
    assert len(history._values) <= 40


def test_extending_equals_updating():
    one, many = HistoryBuffer(max_length=7), HistoryBuffer(max_length=7)
    values = np.random.default_rng(0).normal(size=50)
    for i, value in enumerate(values):
        one.update(float(value), i)
    for at in range(0, 50, 9):
        part = slice(at, min(at + 9, 50))
        many.extend(values[part], np.arange(50)[part])
    assert one.values() == many.values()
    assert one.global_avg() == many.global_avg()  # to the last bit, however they came


def test_state_round_trip():
    history = HistoryBuffer(max_length=3)
    for i in range(5):
        history.update(i / 3, i)
    other = HistoryBuffer(max_length=3)
    other.load_state_dict(history.state_dict())
    assert other.values() == history.values()
    assert other.global_avg() == history.global_avg()


def test_an_empty_history_says_so():
    with pytest.raises(IndexError, match="empty"):
        HistoryBuffer().latest()
    with pytest.raises(ValueError, match="max_length=0"):
        HistoryBuffer(max_length=0)


def test_nan_is_a_value():
    history = HistoryBuffer()
    history.update(math.nan, 0)
    assert math.isnan(history.latest())
