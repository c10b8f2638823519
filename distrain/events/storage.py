"""EventStorage: scalars, images and histograms recorded during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distrain.events.fan_out import FanOut
from distrain.events.histogram import Histogram, PendingHistogram, count_values
from distrain.events.history import HistoryBuffer
from distrain.events.history_store import Block, Histories
from distrain.events.pending import ScalarKind
from distrain.events.recorder import ScalarRecorder

_KIND_KEYS = ("reduce", "smoothing_hint", "is_loss")  # of ScalarKind, in a checkpoint


@dataclass(frozen=True)
class Spread:
    """Extremes over ranks of a scalar's mean over a window, in float32 precision."""

    min: float
    min_rank: int
    max: float
    max_rank: int


class EventStorage(ScalarRecorder):
    """Scalars, images and histograms by name; `get_event_storage` returns it inside its `with`.

    Without a trainer a value enters its history immediately. Under a trainer it is this rank's
    value at first; reduced over ranks, it enters the history after its window (see `reduction`).

    Args:
        start_iter: the first iteration.

    Attributes:
        images: (name, image, iteration).
        pending_histograms: (name, histogram on its device, iteration).
        early_stop: True on any rank ends training on all ranks at the end of the trainer's period.
        fold_arrived: brings windows that are reduced already into the histories.
        spread_of: returns the spread of a scalar over ranks.
    """

    def __init__(self, start_iter: int = 0) -> None:
        super().__init__(start_iter)
        self._histories = Histories(self.kinds)
        self.images: FanOut[tuple[str, NDArray[Any], int]] = FanOut()
        self.pending_histograms: FanOut[tuple[str, PendingHistogram, int]] = FanOut()
        self.early_stop = False
        self.fold_arrived: Callable[[], object] | None = None
        self.spread_of: Callable[[str], Spread] | None = None

    def put_image(self, name: str, image: Tensor | NDArray[Any]) -> None:
        """Put an image: (3, H, W), (1, H, W) or (H, W); uint8, or floats in [0, 1].

        Raises:
            ValueError: another shape.
        """
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] not in (1, 3)):
            raise ValueError(
                f"image {self._prefix + name!r}: expected shape (3, H, W), (1, H, W) or (H, W), "
                f"not {array.shape}"
            )
        self.images.items.append((self._prefix + name, array.copy(), self._iter))

    def put_histogram(self, name: str, values: Tensor, bins: int = 64) -> None:
        """Put the histogram of a tensor's values; counted on its device, read back when written.

        Args:
            name: prefixed by the current `name_scope`.
            values: any shape, floating or integer.
            bins: number of bins of equal width between the smallest and the largest value.
        """
        pending = count_values(values, bins=bins)
        self.pending_histograms.items.append((self._prefix + name, pending, self._iter))

    def latest(self) -> dict[str, float]:
        """Return the newest value of every scalar; before its window's end that of this rank.

        Tensors of this rank that are not reduced yet are read back.
        """
        found = {name: buffer.latest() for name, buffer in self.histories().items()}
        for row in self._rows:
            found |= row.read()
        return found

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, float]:
        """Return every scalar's median over `window_size` iterations; see `scalars_until`."""
        newest = max((h.latest_iteration() for h in self.histories().values()), default=-1)
        scalars = self._histories.until(newest, window_size=window_size)
        return {name: value for name, (value, _) in scalars.items()}

    def scalars_until(self, iteration: int, *, window_size: int) -> dict[str, tuple[float, int]]:
        """Return every scalar as of an iteration: name -> (value, its iteration).

        Args:
            iteration: later values are ignored.
            window_size: a scalar with `smoothing_hint` is the median of its values in this many
                iterations up to `iteration`; any other, or one without values there, is the newest.
        """
        self._fold()
        return self._histories.until(iteration, window_size=window_size)

    def scalars_until_each(
        self, iterations: Sequence[int], *, window_size: int
    ) -> list[dict[str, tuple[float, int]]]:
        """Return `scalars_until` per iteration; cheap if they are `window_size` apart."""
        self._fold()
        return self._histories.until_each(iterations, window_size=window_size)

    def history(self, name: str) -> HistoryBuffer:
        """Return the history of one scalar.

        Raises:
            KeyError: there is none; names the available ones.
        """
        histories = self.histories()
        if name not in histories:
            raise KeyError(f"no scalar {name!r}; available: {', '.join(sorted(histories))}")
        return histories[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return all histories by name."""
        self._fold()
        return self._histories.buffers()

    def latest_iteration(self, name: str) -> int:
        """Return the iteration of the newest value in a scalar's history, -1 if there is none."""
        self._fold()
        return self._histories.latest_iteration(name)

    def spread(self, name: str) -> Spread:
        """Return the spread of a scalar over ranks in its last window; KeyError if unknown."""
        if self.spread_of is None:
            raise KeyError(f"no spread of {name!r}: expected a storage of a trainer")
        return self.spread_of(name)

    def vis_data(self) -> list[tuple[str, NDArray[Any], int]]:
        """Return the images put and not cleared: `[(name, image, iteration), ...]`."""
        return list(self.images.items)

    def clear_images(self) -> None:
        """Drop all images."""
        self.images.clear()

    def histograms(self) -> list[tuple[str, Histogram, int]]:
        """Return the histograms put and not cleared; each is read back from its device now."""
        return [(name, pending.read(), at) for name, pending, at in self.pending_histograms.items]

    def clear_histograms(self) -> None:
        """Drop all histograms."""
        self.pending_histograms.clear()

    def fold(self, block: Block, kinds: Mapping[str, ScalarKind]) -> None:
        """Append reduced values to the histories.

        Args:
            block: values; this rank may never have put some of the names.
            kinds: the settings of the names.
        """
        for name in block.names:
            if name not in self.kinds:  # reduce="local" is in no other rank's kinds
                self.kinds[name] = kinds[name]
        self._histories.append(block)

    def _fold(self) -> None:
        """Bring the histories up to date."""
        if self.fold_arrived is not None:
            self.fold_arrived()
        if not self.is_reduced_by_trainer:
            for row in self.take_rows():
                for name, value in row.read().items():
                    self._histories.update(name, value, row.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the histories and kinds by name, without values that are not reduced yet."""
        return {
            name: {**history.state_dict(), **dict(zip(_KIND_KEYS, self.kinds[name], strict=True))}
            for name, history in self.histories().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the histories of `state_dict`."""
        for name, saved in state.items():
            self.kinds[name] = ScalarKind(*(saved[key] for key in _KIND_KEYS))
            self._loaded.add(name)
            self._histories.load(name, saved)

    def __enter__(self) -> EventStorage:
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert _entered[-1] is self
        _entered.pop()


_entered: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """Return the EventStorage entered last; RuntimeError outside of any."""
    if not _entered:
        raise RuntimeError("no EventStorage: call this inside `with EventStorage(0) as storage:`")
    return _entered[-1]


def entered_storage() -> EventStorage | None:
    """Return the EventStorage entered last; None outside of any."""
    return _entered[-1] if _entered else None
