"""Permutations held to what the word says, and to chance."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from distrain.data.permutation import Ints, mixed, permuted, sample_seeds

PRIMES = [2, 3, 5, 7, 11, 13, 97, 1009]
SIZES = sorted(
    {*range(1, 20), *PRIMES, *(2**k + d for k in range(2, 14) for d in (-1, 0, 1)), 1797}
)


def whole(size: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    return permuted(np.arange(size), size=size, seed=seed, epoch=epoch).tolist()


def epochs_of(size: int, num: int, *, seed: int = 0) -> Ints:
    """Return (num, size): the permutations of the first epochs."""
    epochs = np.repeat(np.arange(num), size)
    return permuted(np.tile(np.arange(size), num), size=size, seed=seed, epoch=epochs).reshape(
        num, size
    )


def chi_square(counts: Ints) -> float:
    """Return how many standard deviations chi-square is from its mean, the degrees of freedom."""
    expected = counts.mean()
    freedom = counts.size - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    return (chi2 - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", SIZES)
def test_every_value_comes_once(size: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (7, 10**9), (2**63, 3)]:
        assert sorted(whole(size, seed=seed, epoch=epoch)) == list(range(size))


def test_a_huge_range_costs_no_more_than_its_positions() -> None:
    size = 10**12 + 39
    positions = np.array([0, 1, size // 2, size - 1])
    found = permuted(positions, size=size, seed=0, epoch=5)
    assert len({*found.tolist()}) == 4
    assert ((found >= 0) & (found < size)).all()


def test_seeds_and_epochs_have_permutations_of_their_own() -> None:
    found = {tuple(whole(100, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(found) == 25


def test_positions_of_several_epochs_in_one_call_are_those_of_each() -> None:
    together = permuted(np.array([0, 1, 2, 0, 1]), size=50, seed=3, epoch=np.array([6, 6, 6, 7, 9]))
    assert together.tolist() == [
        *whole(50, seed=3, epoch=6)[:3],
        whole(50, seed=3, epoch=7)[0],
        whole(50, seed=3, epoch=9)[1],
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_sets_come_in_every_order_equally_often(size: int) -> None:
    names = epochs_of(size, 24_000) @ size ** np.arange(size)
    _, counts = np.unique(names, return_counts=True)
    assert counts.size == len([*itertools.permutations(range(size))])
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("size", [10, 97, 1797])
def test_neighbours_in_the_stream_are_no_neighbours_in_the_set(size: int) -> None:
    orders = epochs_of(size, 400_000 // size)
    steps = (orders[:, 1:] - orders[:, :-1]) % size
    assert abs(chi_square(np.bincount(steps.ravel(), minlength=size)[1:])) < 4
    # a random permutation has one fixed point on average
    assert abs((orders == np.arange(size)).sum(axis=1).mean() - 1) < 4 / len(orders) ** 0.5


def test_the_order_of_one_epoch_says_nothing_of_the_next() -> None:
    orders = epochs_of(100, 2000).astype(float)
    correlation = np.corrcoef(orders[:-1].ravel(), orders[1:].ravel())[0, 1]
    assert abs(correlation) < 4 / (1999 * 100) ** 0.5


def test_the_order_is_the_same_in_every_process_and_release() -> None:
    # written down from the first run: a change would reorder the samples of every run on disk
    assert whole(10) == [3, 4, 5, 2, 0, 1, 8, 7, 6, 9]
    code = (
        "import numpy as np; from distrain.data.permutation import permuted; "
        "print(permuted(np.arange(1797), size=1797, seed=5, epoch=8).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(whole(1797, seed=5, epoch=8))


def test_splitmix64_is_the_published_one() -> None:
    # Its generator adds the golden gamma and mixes; this is its first output from state 0.
    golden = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert int(mixed(golden)[0]) == 0xE220A8397B1DCDAF
    assert int(mixed(np.array([1], np.uint64))[0]) == 0x5692161D100B05E5


def test_sample_seeds_differ_in_each_of_their_three_parts() -> None:
    epochs, samples = (grid.ravel() for grid in np.meshgrid(np.arange(50), np.arange(50)))
    seeds = [int(s) for seed in range(4) for s in sample_seeds(epochs, samples, seed=seed)]
    assert len({*seeds}) == 4 * 50 * 50
    bits = np.array([[seed >> bit & 1 for bit in range(64)] for seed in seeds])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / len(seeds) ** 0.5
