"""TokenBudget: batches of a number of tokens, instead of a number of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Dataset
from typing_extensions import override

from distrain.checks import whole
from distrain.data.permutation import Ints
from distrain.data.samplers import SampleOrder, Shuffled, per_sample
from distrain.errors import ConfigError


class TokenBudget(SampleOrder):
    """Batches of at most `max_tokens`, of samples of similar length, in another order per epoch.

    `data.batch_size` counts these batches: with 8 of them on 4 ranks each rank takes 2 per
    iteration, in `trainer.accumulation` forwards. So every rank has the same number of forwards.
    Samples are sorted by length and put together once; each sample occurs once per epoch.

    Example: lengths 1 1 2 3 and 4 tokens make the batches [1 1] (a third sample would pad all to
    2, 6 tokens), [2], [3]; without padding [1 1 2] and [3].

    Args:
        dataset: of which samples are taken.
        lengths: (n,) tokens of each sample; or the name of the data set's attribute.
        max_tokens: per batch.
        seed: of the run, >= 0.
        padded: count each sample as the longest one of its batch, as `collate` pads it; False
            counts its own tokens.

    Attributes:
        per_epoch: number of batches.

    Raises:
        ConfigError: a sample is longer than `max_tokens`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        lengths: ArrayLike | str,
        max_tokens: int,
        seed: int,
        padded: bool = True,
    ) -> None:
        values = per_sample(dataset, "lengths", lengths)
        whole("data.sampler.max_tokens", max_tokens, least=1)
        if values.max() > max_tokens:
            longest = int(values.argmax())
            raise ConfigError(
                f"data.sampler.max_tokens={max_tokens}: expected at least {int(values.max())}, the "
                f"length of sample {longest}; or leave such samples out of the data set"
            )
        shuffled = Shuffled(len(values), seed=seed).at(0, len(values))[1]
        # stable: samples of one length stay shuffled
        self._samples = shuffled[np.argsort(values[shuffled], kind="stable")]
        self._starts = _starts(values[self._samples], max_tokens, padded=padded)
        self.per_epoch = len(self._starts) - 1
        self._order = Shuffled(self.per_epoch, seed=seed)

    @override
    def at(self, first: int, num: int) -> tuple[Ints, Ints]:
        """Return the (num,) epochs and (num,) numbers of batches from position `first` on."""
        return self._order.at(first, num)

    @override
    def samples(self, epochs: Ints, indices: Ints) -> tuple[Ints, Ints]:
        parts = [self._samples[self._starts[i] : self._starts[i + 1]] for i in indices]
        return np.repeat(epochs, [len(part) for part in parts]), np.concatenate(parts)


def _starts(lengths: Ints, max_tokens: int, *, padded: bool) -> Ints:
    """Return where batches start in (n,) ascending lengths, and n."""
    starts, total = [0], 0
    for i, length in enumerate(lengths.tolist()):
        total = length * (i + 1 - starts[-1]) if padded else total + length
        if total > max_tokens:
            starts.append(i)
            total = length
    return np.array([*starts, len(lengths)], dtype=np.int64)
