"""Permutations of any length, computed one position at a time.

A seeded permutation of `range(size)` as an array costs O(size) time and memory an epoch and rank; a
keyed bijection gives any position of any epoch at once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 8


def permuted(positions: Ints, *, size: int, seed: int, epoch: int) -> Ints:
    """Return what stands at some positions of the permutation of an epoch.

    A Feistel network (Luby and Rackoff 1988) over the bits of the position, with cycle walking
    (Black and Rogaway 2002): what falls out of the range is permuted again until it is inside.

    Args:
        positions: (n,) each in [0, size).
        size: length of the permutation.
        seed: of the run.
        epoch: each has a permutation of its own.

    Returns:
        (n,) each in [0, size); different positions give different values.
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    keys = _keys(seed, epoch)
    found = _feistel(positions.astype(np.uint64), keys, bits - low_bits, low_bits)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        found[outside] = _feistel(found[outside], keys, bits - low_bits, low_bits)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def mixed(words: Words) -> Words:
    """Return 64 well mixed bits of each word: the finaliser of splitmix64 (Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def sample_seeds(epochs: Ints, samples: Ints, *, seed: int) -> Words:
    """Return a seed of 64 bits for each sample, from the run's seed, its epoch and its number.

    Args:
        epochs: (n,).
        samples: (n,).
        seed: of the run.
    """
    words = mixed(samples.astype(np.uint64) + _keys(seed, -1)[0])
    return mixed(words ^ mixed(epochs.astype(np.uint64) + _keys(seed, -1)[1]))


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> Words:
    """Return (8,) keys for the rounds; epoch -1 stands for those of `sample_seeds`."""
    words = np.random.SeedSequence([seed, epoch + 1]).generate_state(_ROUNDS, np.uint64)
    return np.asarray(words)


def _feistel(words: Words, keys: Words, high_bits: int, low_bits: int) -> Words:
    """Permute words of high_bits + low_bits bits: each half in turn is changed by the other."""
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << high_bits) - 1)
    shift = np.uint64(low_bits)
    high, low = words >> shift, words & low_mask
    for number in range(0, _ROUNDS, 2):
        high = high ^ (mixed(low + keys[number]) & high_mask)
        low = low ^ (mixed(high + keys[number + 1]) & low_mask)
    return (high << shift) | low
