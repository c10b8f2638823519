"""Orders of samples: numbers workable by hand, seeking, and proportions."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from distrain.data.loader import TrainLoader
from distrain.data.samplers import (
    ByLength,
    ClassBalanced,
    Mixture,
    MixtureOrder,
    Shuffled,
    Weighted,
)
from distrain.data.token_budget import TokenBudget
from distrain.errors import ConfigError


def numbers(size):
    return TensorDataset(torch.arange(size))


def orders():
    mixture = Mixture(
        {"a": numbers(7), "b": numbers(5), "c": numbers(3)}, weights={"a": 3, "b": 2, "c": 1}
    )
    return {
        "shuffled": Shuffled(13, seed=3),
        "weighted": Weighted(numbers(13), weights=np.arange(13), seed=3),
        "balanced": ClassBalanced(numbers(13), labels=[0] * 10 + [1] * 3, seed=3),
        "length": ByLength(numbers(13), lengths=np.arange(13) % 5, batch_size=4, seed=3, window=3),
        "mixture": MixtureOrder(mixture, seed=3),
    }


@pytest.mark.parametrize("name", orders())
def test_any_part_is_that_part_of_the_whole(name):
    epochs, samples = orders()[name].at(0, 200)
    for first, num in ((0, 1), (1, 7), (50, 50), (123, 77), (199, 1)):
        part = orders()[name].at(first, num)
        assert np.array_equal(part[0], epochs[first : first + num])
        assert np.array_equal(part[1], samples[first : first + num])


@pytest.mark.parametrize("name", ["shuffled", "length"])
def test_each_sample_once_per_epoch(name):
    epochs, samples = orders()[name].at(0, 13 * 12)  # 13 windows of 12
    for epoch in range(12):
        assert sorted(samples[epochs == epoch]) == list(range(13))


def test_far_away_costs_the_same():
    for order in orders().values():
        epochs, samples = order.at(10**9, 50)
        assert len(epochs) == len(samples) == 50
        assert samples.min() >= 0


def test_weights_are_frequencies():
    _, samples = Weighted(numbers(4), weights=[0.0, 1.0, 2.0, 0.0], seed=0).at(0, 30_000)
    counts = np.bincount(samples, minlength=4)
    assert counts[0] == counts[3] == 0
    # three standard deviations of a binomial(30,000, 1/3): 3 * sqrt(30,000 * 2/9) = 245
    assert abs(counts[1] - 10_000) < 245


def test_classes_are_equally_frequent():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    _, samples = ClassBalanced(numbers(100), labels=labels, seed=1).at(0, 30_000)
    counts = np.bincount(labels[samples])
    assert np.abs(counts - 10_000).max() < 245


def test_batches_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 1000)
    order = ByLength(numbers(1000), lengths=lengths, batch_size=10, seed=0)
    _, samples = order.at(0, 1000)
    ranges = np.ptp(lengths[samples].reshape(-1, 10), axis=1)
    shuffled = np.ptp(lengths[Shuffled(1000, seed=0).at(0, 1000)[1]].reshape(-1, 10), axis=1)
    assert ranges.mean() < shuffled.mean() / 20
    means = lengths[samples].reshape(-1, 10).mean(1)
    assert np.abs(np.diff(means)).mean() > 100, "batches are shuffled, not sorted"


def test_a_mixture_is_even_at_any_place():
    mixture = Mixture({"a": numbers(70), "b": numbers(50)}, weights={"a": 3, "b": 1})
    _, samples = MixtureOrder(mixture, seed=0).at(0, 4000)
    of_a = np.cumsum(samples < 70)
    expected = np.arange(1, 4001) * 0.75
    assert np.abs(of_a - expected).max() <= 1
    first_epoch = samples[samples < 70][:70]
    assert sorted(first_epoch) == list(range(70)), "each sample of a set once per its epoch"
    assert [int(mixture[i][0]) for i in (0, 69, 70, 119)] == [0, 69, 0, 49]


@pytest.mark.parametrize("weights", [(1e7, 1), (1, 1e7)])
def test_a_mixture_draws_from_a_set_of_very_small_weight(weights):
    sets = {"a": numbers(5), "b": numbers(5)}
    mixture = Mixture(sets, weights=dict(zip(sets, weights, strict=True)))
    _, samples = MixtureOrder(mixture, seed=0).at(0, 4 << 20)
    assert sorted(np.bincount(samples // 5)) == [4, (4 << 20) - 4]


@pytest.mark.parametrize("name", orders())
def test_ranks_and_workers_share_one_order(name):
    """1, 2 and 4 ranks, with and without loader processes, see the same global batches."""
    found = []
    for ranks, workers in ((1, 0), (2, 0), (4, 0), (2, 1)):
        size = 15 if name == "mixture" else 13
        loaders = [
            TrainLoader(
                numbers(size),
                batch_size=4,
                rank=rank,
                world_size=ranks,
                workers=workers,
                sampler=orders()[name],
            )
            for rank in range(ranks)
        ]
        batches = [islice(loader.batches(5), 6) for loader in loaders]
        found.append(
            [
                torch.cat([part[0] for part in parts]).tolist()
                for parts in zip(*batches, strict=True)
            ]
        )
        for loader in loaders:
            loader.close()
    assert all(each == found[0] for each in found)
    expected = orders()[name].at(20, 24)[1].reshape(6, 4)
    if name != "mixture":  # whose data set has the values of each set from 0 on
        assert found[0] == expected.tolist()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Weighted(numbers(3), weights=[1, 2], seed=0), "expected 3 values, got shape [2]"),
        (lambda: Weighted(numbers(2), weights=[0, 0], seed=0), "not all 0"),
        (lambda: Weighted(numbers(2), weights=[1, -1], seed=0), ">= 0"),
        (lambda: Weighted(numbers(2), weights="wieghts", seed=0), "TensorDataset has no such attr"),
        (lambda: Mixture({"a": numbers(2)}, weights={"b": 1}), "for each of a"),
        (lambda: Mixture({"a": numbers(2)}, weights={"a": float("nan")}), "for each of a"),
        (
            lambda: TokenBudget(
                numbers(3), lengths=[float("nan"), 2, 9], max_tokens=4, seed=0
            ),  # the NaN would hide that 9 is above 4
            "data.sampler.lengths: expected finite numbers >= 0",
        ),
        (lambda: MixtureOrder(numbers(2), seed=0), "expected distrain.data.Mixture"),
    ],
)
def test_mistakes(make, text):
    with pytest.raises(ConfigError) as error:
        make()
    assert text in str(error.value)
