"""Orders of samples: weighted, class-balanced, by length, mixtures of data sets.

A sampler maps positions of an endless sequence to samples, as a pure function of the seed. So every
rank and loader worker computes the same order, and a run starts at any iteration in O(log n).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import ConcatDataset, Dataset
from typing_extensions import override

from distrain.checks import whole
from distrain.data.permutation import Ints, mixed, permuted
from distrain.errors import ConfigError

_WEIGHT_BITS = 20  # of a mixture's fractions: positions up to 2 ** 43 do not overflow int64


class SampleOrder(ABC):
    """Endless sequence of samples; equal on all ranks.

    Attributes:
        per_epoch: positions of `at` per epoch; None: as many as the data set has samples.
    """

    per_epoch: int | None = None

    @abstractmethod
    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        """Return the (num,) epochs and (num,) indices of the samples from position `first` on."""

    def samples(self, epochs: Ints, indices: Ints) -> tuple[Ints, Ints]:
        """Return the epochs and samples of one forward from the result of `at`: as they are.

        Where `at` counts groups of samples instead, their samples.
        """
        return epochs, indices


class Shuffled(SampleOrder):
    """Seeded permutations of a data set, one per epoch: the default.

    Args:
        size: number of samples.
        seed: of the run, >= 0.
        shuffle: False repeats the data set in its own order.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool = True) -> None:
        self.size, self._seed, self._shuffle = whole("size", size, least=1), seed, shuffle

    @override
    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        positions = np.arange(first, first + num, dtype=np.int64)
        epochs, positions = np.divmod(positions, self.size)
        if self._shuffle:
            positions = permuted(positions, size=self.size, seed=self._seed, epoch=epochs)
        return epochs, positions


class Weighted(SampleOrder):
    """Samples drawn with replacement, in proportion to their weights.

    As `torch.utils.data.WeightedRandomSampler`; an epoch is as many draws as there are samples.

    Args:
        dataset: of which samples are drawn.
        weights: (n,) finite, >= 0, not all 0; or the name of the data set's attribute.
        seed: of the run, >= 0.

    Raises:
        ConfigError: there are not n such weights.
    """

    def __init__(self, dataset: Dataset[Any], *, weights: ArrayLike | str, seed: int) -> None:
        values = per_sample(dataset, "weights", weights).astype(np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise ConfigError("data.sampler.weights: expected finite numbers >= 0, not all 0")
        self.size = len(values)
        self._edges = np.cumsum(values)  # (n,): sample i has the interval [edge i - 1, edge i)
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64)

    @override
    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        positions = np.arange(first, first + num, dtype=np.int64)
        bits = mixed(mixed(positions.astype(np.uint64)) + self._key) >> np.uint64(11)
        uniform = bits.astype(np.float64) * 2.0**-53  # [0, 1)
        found = np.searchsorted(self._edges, uniform * self._edges[-1], side="right")
        # the product may round up to the last edge; samples of weight 0 at the end have it, too
        last = np.searchsorted(self._edges, self._edges[-1], side="left")
        return positions // self.size, np.minimum(found, last).astype(np.int64)


class ClassBalanced(Weighted):
    """Samples drawn with replacement, each class equally often.

    Args:
        dataset: of which samples are drawn.
        labels: (n,) class of each sample; or the name of the data set's attribute.
        seed: of the run, >= 0.
    """

    def __init__(self, dataset: Dataset[Any], *, labels: ArrayLike | str, seed: int) -> None:
        classes = per_sample(dataset, "labels", labels)
        _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
        super().__init__(dataset, weights=1.0 / counts[inverse], seed=seed)


class ByLength(SampleOrder):
    """Batches of samples of similar length, which need little padding.

    The shuffled sequence is cut into windows of `window` batches. In each, samples are sorted by
    length, cut into batches, and the batches are shuffled. Each sample occurs once per epoch.

    Args:
        dataset: of which samples are taken.
        lengths: (n,) length of each sample; or the name of the data set's attribute.
        batch_size: over all ranks.
        seed: of the run, >= 0.
        window: in batches; more give more similar lengths and less random batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        lengths: ArrayLike | str,
        batch_size: int,
        seed: int,
        window: int = 50,
    ) -> None:
        self._lengths = per_sample(dataset, "lengths", lengths)
        self._shuffled = Shuffled(len(self._lengths), seed=seed)
        self._batch_size = whole("data.batch_size", batch_size, least=1)
        self._window = whole("data.sampler.window", window, least=1)
        self._seed = seed
        self._cached: tuple[int, tuple[Ints, Ints]] | None = None

    @override
    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        size = self._window * self._batch_size
        windows = range(first // size, (first + num - 1) // size + 1)
        parts = [self._sorted(number) for number in windows]
        epochs, samples = (np.concatenate(each) for each in zip(*parts, strict=True))
        start = first - windows.start * size
        return epochs[start : start + num], samples[start : start + num]

    def _sorted(self, number: int) -> tuple[Ints, Ints]:
        """Return the (window * B,) epochs and samples of a window, batches in their order."""
        if self._cached is None or self._cached[0] != number:
            size = self._window * self._batch_size
            epochs, samples = self._shuffled.at(number * size, size)
            by_length = np.argsort(self._lengths[samples], kind="stable")
            order = permuted(
                np.arange(self._window), size=self._window, seed=self._seed, epoch=number
            )
            index = by_length.reshape(self._window, -1)[order].reshape(-1)
            self._cached = number, (epochs[index], samples[index])
        return self._cached[1]


class Mixture(ConcatDataset[Any]):
    """Several data sets as one, for `MixtureOrder`; sample i of set j follows those of sets < j.

    Args:
        datasets: by name, in the order of their samples.
        weights: relative frequency per name, > 0; default: the size of each set.

    Raises:
        ConfigError: the names differ, or a weight is not above 0.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any]],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(list(datasets.values()))
        sizes = {name: len(each) for name, each in datasets.items()}  # type: ignore[arg-type]
        weights = sizes if weights is None else weights
        is_good = all(0 < weight < float("inf") for weight in weights.values())
        if weights.keys() != sizes.keys() or not is_good:
            raise ConfigError(
                f"weights={dict(weights)}: expected a number above 0 for each of {', '.join(sizes)}"
            )
        self.sizes = [*sizes.values()]
        self.weights = [float(weights[name]) for name in sizes]


class MixtureOrder(SampleOrder):
    """Samples of several data sets, interleaved evenly in proportion to the weights.

    Of the first p samples, set j has its fraction of p, to within one sample per set; a fraction
    below 2 ** -20 counts as that. Each set is shuffled by itself and starts its next epoch when all
    its samples were taken. Example: weights 3 and 1 take the sets 1 1 1 2 1 1 1 2 in some rotation.

    Args:
        dataset: the mixture.
        seed: of the run, >= 0.
    """

    def __init__(self, dataset: Mixture, *, seed: int) -> None:
        if not isinstance(dataset, Mixture):
            kind = type(dataset).__name__
            raise ConfigError(f"data.train={kind}: expected distrain.data.Mixture for this sampler")
        self._orders = [Shuffled(size, seed=seed + i) for i, size in enumerate(dataset.sizes)]
        self._offsets = np.cumsum([0, *dataset.sizes[:-1]])
        # fraction of set j among the sets from j on, in units of 2 ** -20
        rest = np.cumsum(dataset.weights[::-1])[::-1]
        scale = 1 << _WEIGHT_BITS
        self._fractions = [
            # at most this, or the sets behind it would never be drawn
            min(max(1, round(w / r * scale)), scale - 1)
            for w, r in zip(dataset.weights[:-1], rest[:-1], strict=True)
        ]
        self._fractions.append(scale)  # the last one takes the rest

    @override
    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        epochs, samples = np.empty(num, np.int64), np.empty(num, np.int64)
        left = np.arange(num)  # places that no set has taken yet
        start = first  # position in the sequence of the sets from j on
        for order, offset, fraction in zip(
            self._orders, self._offsets, self._fractions, strict=True
        ):
            positions = np.arange(start, start + len(left) + 1, dtype=np.int64)
            taken = positions * fraction >> _WEIGHT_BITS  # samples of this set before a position
            mine = np.diff(taken).astype(bool)
            if mine.any():
                own_epochs, own = order.at(int(taken[0]), int(mine.sum()))
                epochs[left[mine]], samples[left[mine]] = own_epochs, own + offset
            start -= int(taken[0])
            left = left[~mine]
        return epochs, samples


def per_sample(dataset: Dataset[Any], key: str, values: ArrayLike | str) -> NDArray[Any]:
    """Return the (n,) values of a data set's samples, or those of its attribute of that name."""
    if isinstance(values, str):
        if not hasattr(dataset, values):
            kind = type(dataset).__name__
            raise ConfigError(f"data.sampler.{key}={values}: {kind} has no such attribute")
        values = getattr(dataset, values)
    found = np.asarray(values)
    size = len(dataset)  # type: ignore[arg-type]
    if found.shape != (size,):
        shape: Sequence[int] = found.shape
        raise ConfigError(f"data.sampler.{key}: expected {size} values, got shape {list(shape)}")
    if key == "lengths" and not (np.isfinite(found) & (found >= 0)).all():
        raise ConfigError("data.sampler.lengths: expected finite numbers >= 0")
    return found
