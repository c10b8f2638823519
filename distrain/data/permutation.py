"""Permutations of any length, computed only at the requested positions.

A shuffled array of a data set's indices costs time and memory for the whole of it, in every rank
and epoch; a keyed bijection costs the same few operations at any position of any epoch.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_ROUNDS = 12  # four are enough on large grids (Luby & Rackoff); a handful of cells needs more


def permuted(positions: Ints, *, size: int, seed: int, epoch: int | Ints) -> Ints:
    """Return the values at some positions of the permutation of `range(size)` of an epoch.

    A Feistel network (Luby & Rackoff 1988, "How to Construct Pseudorandom Permutations") on a grid
    of about sqrt(size) rows and columns: the row is shifted by a keyed hash of the column, then the
    column by one of the row, and so on; each step is invertible, so no two positions collide.
    Values in the last, unused cells of the grid pass through it again until they are inside: cycle
    walking (both Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").

    Args:
        positions: (n,) each in [0, size).
        size: length of the permutation.
        seed: of the run, >= 0.
        epoch: (n,) or one for all; each epoch has its own permutation.

    Returns:
        (n,) each in [0, size); different positions of an epoch give different values.
    """
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = _round_keys(seed, np.atleast_1d(np.asarray(epoch, np.int64)))
    found = _feistel(positions.astype(np.uint64), keys, rows, columns)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        own_keys = keys if keys.shape[1] == 1 else keys[:, outside]
        found[outside] = _feistel(found[outside], own_keys, rows, columns)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def sample_seeds(epochs: Ints, samples: Ints, *, seed: int) -> Words:
    """Return a seed of 64 bits for each sample, from the run's seed, its epoch and its number.

    Args:
        epochs: (n,).
        samples: (n,).
        seed: of the run, >= 0.
    """
    *_, key_of_sample, key_of_epoch = _keys(seed)
    words = mixed(samples.astype(np.uint64) + key_of_sample)
    return mixed(words ^ mixed(epochs.astype(np.uint64) + key_of_epoch))


def mixed(words: Words) -> Words:
    """Return 64 well mixed bits of each word: the finaliser of SplitMix64.

    Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators", with the constants
    of Stafford's variant 13. Example: 0 stays 0, 1 becomes 0x5692161D100B05E5.
    """
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


@lru_cache(maxsize=8)
def _keys(seed: int) -> Words:
    """Return the keys of a seed: one per round, then the two of `sample_seeds`."""
    return np.asarray(np.random.SeedSequence(seed).generate_state(_ROUNDS + 2, np.uint64))


def _round_keys(seed: int, epochs: Ints) -> Words:
    """Return (_ROUNDS, n) keys for (n,) epochs, or (_ROUNDS, 1) for one epoch."""
    first = int(epochs.min())
    each = np.arange(first, int(epochs.max()) + 1).astype(np.uint64)
    table = mixed(mixed(each) + _keys(seed)[:_ROUNDS, np.newaxis])
    return table if table.shape[1] == 1 else table[:, epochs - first]


def _feistel(words: Words, keys: Words, rows: int, columns: int) -> Words:
    """Permute the cells of a grid, numbered row by row, with (_ROUNDS, n) or (_ROUNDS, 1) keys."""
    height, width = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(words, width)
    for number in range(0, _ROUNDS, 2):
        row = (row + mixed(column + keys[number]) % height) % height
        column = (column + mixed(row + keys[number + 1]) % width) % width
    return row * width + column
