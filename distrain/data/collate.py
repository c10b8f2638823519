"""Load samples and collate them into a batch, seeded per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from distrain.data.permutation import Ints, sample_seeds
from distrain.data.random_states import kept_generators, set_generators
from distrain.data.ring import collate_samples
from distrain.errors import ConfigError, add_note

Collate = Callable[[list[Any]], Any]


class MicroBatch(NamedTuple):
    """The samples that one rank loads for one forward."""

    epochs: Ints  # (n,)
    samples: Ints  # (n,)


def length_of(dataset: Any, key: str) -> int:
    """Return the length of a map-style data set.

    Raises:
        ConfigError: it is empty, or has no length or no items; names `key`.
    """
    name = type(dataset).__name__
    has_items = hasattr(dataset, "__getitem__") or hasattr(dataset, "get_batch")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and has_items):
        raise ConfigError(
            f"{key}: {name} is not a map-style data set; expected __len__, and __getitem__ or "
            "get_batch (for an iterable set data.loader, or give it to Trainer itself)"
        )
    size = len(dataset)
    if size < 1:
        raise ConfigError(f"{key}: {name} has length 0; expected samples")
    return size


class BatchReader(Dataset[Any], ABC):
    """Loads the batch of an item of a sampler, in a rank or a loader process.

    Attributes:
        draws: whether loading sets the random generators of the process.
    """

    draws: bool

    @abstractmethod
    def __getitem__(self, item: Any) -> Any: ...


class Fetch(BatchReader):
    """A data set whose items are the micro-batches of another.

    Args:
        dataset: map-style; see `data.TrainLoader`.
        seed: of the run, for random numbers that the data set draws; None if it draws none.
        collate: makes a batch of a list of samples; None is torch's default.
    """

    def __init__(self, dataset: Any, *, seed: int | None, collate: Collate | None) -> None:
        self._dataset = dataset
        self._collate = collate or collate_samples
        self._get_batch = getattr(dataset, "get_batch", None)
        if type(dataset) is TensorDataset and collate is None:
            # the same batch as sample by sample, in one indexing per tensor
            self._get_batch = lambda indices: [tensor[indices] for tensor in dataset.tensors]
            seed = None
        self._seed, self.draws = seed, seed is not None

    def __getitem__(self, item: MicroBatch) -> Any:
        if self._get_batch is not None:
            if self._seed is not None:
                first = sample_seeds(item.epochs[:1], item.samples[:1], seed=self._seed)
                set_generators(int(first[0]))
            return self._get_batch(torch.from_numpy(item.samples))
        indices = item.samples.tolist()
        if self._seed is not None:
            seeds = sample_seeds(item.epochs, item.samples, seed=self._seed).tolist()
            return self._collate([self._sample(*of) for of in zip(indices, seeds, strict=True)])
        many = getattr(self._dataset, "__getitems__", None)
        if many is not None:
            return self._collate(many(indices))
        return self._collate([self._sample(index, None) for index in indices])

    def _sample(self, index: int, seed: int | None) -> Any:
        if seed is not None:
            set_generators(seed)
        try:
            return self._dataset[index]
        except Exception as error:
            add_note(error, f"while loading sample {index} of {type(self._dataset).__name__}")
            raise


def load_here(
    fetch: BatchReader, sampler: Iterable[Any], *, pin_memory: bool = False
) -> Iterator[Any]:
    """Load in this process, whose random generators stay as they are.

    Args:
        fetch: of the data set.
        sampler: the items, such as micro-batches, in order.
        pin_memory: return page-locked memory, if there is an accelerator.
    """
    pin_memory = pin_memory and torch.accelerator.is_available()
    for item in sampler:
        if fetch.draws:
            with kept_generators():
                batch = fetch[item]
        else:
            batch = fetch[item]
        yield pinned(batch) if pin_memory else batch
