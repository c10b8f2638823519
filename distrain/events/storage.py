"""What training says of itself: scalars, images and histograms, by name and iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distrain.events.fan_out import FanOut
from distrain.events.histogram import Histogram, PendingHistogram, count_values
from distrain.events.history import HistoryBuffer
from distrain.events.history_store import Block, Histories
from distrain.events.pending import (
    LOSS,
    OPERATIONS,
    Operation,
    ScalarKind,
    ScalarRow,
    own_copy,
    stack,
)

_FLOATS, _TENSORS = {float}, {Tensor}
_MAX_CALLS = 1000  # shapes of put_scalars calls that are remembered as checked


@dataclass(frozen=True)
class Spread:
    """How far one scalar's mean over a window differs between ranks (float32 precision)."""

    min: float
    min_rank: int
    max: float
    max_rank: int


class EventStorage:
    """Holds what training says of itself; found by `get_event_storage` while it is entered.

    Alone, a value is in its history at once. Under a trainer, a value is first this rank's own, and
    enters the history, combined over all ranks, when its window is over (see `reduction`).

    Args:
        start_iter: the first iteration.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self._iter = start_iter
        self._prefix = ""
        self._kinds: dict[str, ScalarKind] = {}
        self._checked_calls: set[tuple[object, ...]] = set()
        self._row = ScalarRow(start_iter)
        self._rows: list[ScalarRow] = [self._row]
        self._taken: list[ScalarRow] = []  # rows of the current iteration that were taken already
        self._histories = Histories(self._kinds)
        self.images: FanOut[tuple[str, NDArray[Any], int]] = FanOut()
        self.pending_histograms: FanOut[tuple[str, PendingHistogram, int]] = FanOut()
        # set by who combines over ranks
        self.fold_arrived: Callable[[], object] | None = None
        self.spread_of: Callable[[str], Spread] | None = None
        self.combined_by_trainer = False  # True: rows wait for `take_rows` instead of folding
        # True on any rank ends training on all where the current period of the trainer ends
        self.early_stop = False

    @property
    def iter(self) -> int:
        """The current iteration."""
        return self._iter

    @iter.setter
    def iter(self, iteration: int) -> None:
        if iteration != self._iter:
            self._iter = iteration
            row = self._row
            if row.floats or row.tensors:
                if not self.combined_by_trainer and len(self._rows) > 1000:
                    self.histories()  # nobody else bounds them
                self._row = ScalarRow(iteration)
                self._rows.append(self._row)
            else:
                row.iteration = iteration

    def step(self) -> None:
        """Go on to the next iteration."""
        self.iter = self._iter + 1

    def put_scalar(
        self,
        name: str,
        value: float | Tensor,
        smoothing_hint: bool = True,
        *,
        reduce: Operation = "mean",
        count: float | None = None,
    ) -> None:
        """Put one scalar of this iteration; a second put of the name replaces the first.

        A tensor is copied on its device and not read back.

        Args:
            name: its name, behind the current `name_scope`.
            value: a number, or a tensor with one element on any device.
            smoothing_hint: whether writers may show a median over iterations.
            reduce: the operation over ranks; "local" keeps this rank's value to itself.
            count: how many samples the value stands for: its weight in the mean over ranks.

        Raises:
            ValueError: the tensor has more than one element, the operation does not exist, or the
                name was put with other settings before.
        """
        name = self._prefix + name
        kind = self._kinds.get(name)
        if kind is None or kind[0] != reduce or kind[1] != smoothing_hint:
            self._declare(name, ScalarKind(reduce, bool(smoothing_hint)))
        if not self.combined_by_trainer and name in self._row:
            self.histories()
        row = self._row
        if value.__class__ is float:
            row.floats[name] = value
            if row.tensors:
                row.tensors.pop(name, None)
        elif isinstance(value, Tensor):
            row.put_block(own_copy(name, value), name)
        else:
            row.put_float(name, float(value))
        if count is not None:
            row.counts[name] = float(count)

    def put_scalars(
        self,
        *,
        smoothing_hint: bool = True,
        reduce: Operation = "mean",
        count: float | None = None,
        **scalars: float | Tensor,
    ) -> None:
        """Put several scalars with the same settings: `put_scalars(loss=0.5, accuracy=0.9)`.

        The tensors among them are copied in one operation, which makes this the cheap way.
        Arguments and errors are those of `put_scalar`.
        """
        if self._prefix:
            scalars = {self._prefix + name: value for name, value in scalars.items()}
        call = (reduce, smoothing_hint, *scalars)
        if call not in self._checked_calls:
            self._check_call(call, scalars, ScalarKind(reduce, bool(smoothing_hint)))
        if not self.combined_by_trainer and any(name in self._row for name in scalars):
            self.histories()
        row, types = self._row, set(map(type, scalars.values()))
        if types == _TENSORS:
            row.put_block(stack(scalars), *scalars)  # type: ignore[arg-type]
        elif types == _FLOATS and row.tensors.keys().isdisjoint(scalars.keys()):
            row.floats.update(scalars)  # type: ignore[arg-type]
        else:
            self._put_mixed(scalars)
        if count is not None:
            row.counts.update(dict.fromkeys(scalars, float(count)))

    def _check_call(
        self, call: tuple[object, ...], scalars: Mapping[str, object], kind: ScalarKind
    ) -> None:
        for name in scalars:
            self._declare(name, kind)
        if len(self._checked_calls) >= _MAX_CALLS:
            self._checked_calls.clear()
        self._checked_calls.add(call)

    def _put_mixed(self, scalars: Mapping[str, float | Tensor]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                self._row.put_float(name, float(value))
        if len(tensors) == 1:
            [(name, tensor)] = tensors.items()
            self._row.put_block(own_copy(name, tensor), name)
        elif tensors:
            self._row.put_block(stack(tensors), *tensors)

    def put_losses(
        self, losses: Mapping[str, Tensor], counts: Mapping[str, float] | None = None
    ) -> None:
        """Put what is minimised: training stops on all ranks if one is not finite on any.

        What an operation made anew is not copied, for nobody overwrites it later.

        Args:
            losses: by name, tensors with one element.
            counts: weights in the mean over ranks, of the names whose weight is not 1.
        """
        if not self.combined_by_trainer and not self._row.is_empty():
            self.histories()
        row, prefix = self._row, self._prefix
        for name, loss in losses.items():
            name = prefix + name
            if self._kinds.get(name) is not LOSS:
                self._declare(name, LOSS)
            is_new = not loss.is_leaf and not loss._is_view()
            block = loss.detach() if is_new else own_copy(name, loss)
            row.put_block(block, name)
        if counts:
            row.counts.update({prefix + name: count for name, count in counts.items()})

    def _declare(self, name: str, kind: ScalarKind) -> None:
        if kind.reduce not in OPERATIONS:
            raise ValueError(f"{name}: reduce={kind.reduce!r}; choose one of {OPERATIONS}")
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            raise ValueError(f"{name}: put as {kind}, but before as {known}; use another name")
        self._kinds[name] = kind  # this very object: it is the quicker comparison

    def put_image(self, name: str, image: Tensor | NDArray[Any]) -> None:
        """Put an image for the writers.

        Args:
            name: its name, behind the current `name_scope`.
            image: (3, H, W), (1, H, W) or (H, W); uint8, or floats in [0, 1].

        Raises:
            ValueError: another shape.
        """
        array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] not in (1, 3)):
            raise ValueError(
                f"image {self._prefix + name!r} has shape {array.shape}; "
                "allowed are (3, H, W), (1, H, W) and (H, W)"
            )
        self.images.items.append((self._prefix + name, array.copy(), self._iter))

    def put_histogram(self, name: str, values: Tensor, bins: int = 64) -> None:
        """Put the histogram of a tensor's values; counted on its device, read when written.

        Args:
            name: its name, behind the current `name_scope`.
            values: any shape, floating or integer.
            bins: how many bins of equal width between the smallest and the largest value.
        """
        pending = count_values(values, bins=bins)
        self.pending_histograms.items.append((self._prefix + name, pending, self._iter))

    def latest(self) -> dict[str, float]:
        """Return the newest value of every scalar.

        A value whose window is not over yet is this rank's own (a tensor is read back for it).
        """
        found = {name: buffer.latest() for name, buffer in self.histories().items()}
        for row in self._rows:
            found |= row.read()
        return found

    def put_now(self, name: str) -> float | None:
        """Return what this rank put under a name in the current iteration, None if nothing.

        Whether the row was taken meanwhile, to be combined over ranks, makes no difference.
        """
        for row in (self._row, *self._taken):
            if row.iteration == self._iter and name in row:
                return row.read()[name]
        return None

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, float]:
        """Return for every scalar in the histories its latest value, or its median.

        Args:
            window_size: where the scalar may be smoothed, the median is over its values of this
                many iterations, up to the newest in any history; without any it is the latest.
        """
        newest = max((h.latest_iteration() for h in self.histories().values()), default=-1)
        scalars = self._histories.until(newest, window_size=window_size)
        return {name: value for name, (value, _) in scalars.items()}

    def scalars_until(self, iteration: int, *, window_size: int) -> dict[str, tuple[float, int]]:
        """Return every scalar as it stood after an iteration: name -> (value, its iteration).

        Args:
            iteration: later values are left out.
            window_size: where the scalar may be smoothed, the median is over its values of this
                many iterations, the last of them `iteration`; without any it is the latest.
        """
        self._fold()
        return self._histories.until(iteration, window_size=window_size)

    def scalars_until_each(
        self, iterations: Sequence[int], *, window_size: int
    ) -> list[dict[str, tuple[float, int]]]:
        """Return `scalars_until` of several iterations, `window_size` apart, for little more."""
        self._fold()
        return self._histories.until_each(iterations, window_size=window_size)

    def history(self, name: str) -> HistoryBuffer:
        """Return the history of one scalar; KeyError names those there are."""
        histories = self.histories()
        if name not in histories:
            raise KeyError(f"no scalar {name!r}; there are {sorted(histories)}")
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
        """Return how the scalar differed between ranks in the last window; KeyError if unknown."""
        if self.spread_of is None:
            raise KeyError(f"no spread of {name!r}: nobody combines scalars over ranks here")
        return self.spread_of(name)

    @property
    def kinds(self) -> Mapping[str, ScalarKind]:
        """The settings of every scalar ever put, by name."""
        return self._kinds

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Put `name/` before all that is put inside."""
        old = self._prefix
        self._prefix = f"{old}{name.rstrip('/')}/"
        try:
            yield
        finally:
            self._prefix = old

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

    def take_rows(self) -> list[ScalarRow]:
        """Hand over the rows put so far; what is put from now on starts a new one."""
        taken = self._rows
        if self._row.is_empty():
            taken = taken[:-1]
        now = [row for row in [*reversed(taken), *self._taken] if row.iteration == self._iter]
        self._taken = now
        self._row = ScalarRow(self._iter)
        self._rows = [self._row]
        return taken

    def fold(self, block: Block, kinds: Mapping[str, ScalarKind]) -> None:
        """Append combined values to the histories.

        Args:
            block: of scalars, which this rank may never have put itself.
            kinds: their settings.
        """
        for name in block.names:
            if name not in self._kinds:
                self._kinds[name] = kinds[name]
        self._histories.append(block)

    def _fold(self) -> None:
        """Bring the histories up to date."""
        if self.fold_arrived is not None:
            self.fold_arrived()
        if not self.combined_by_trainer:
            for row in self.take_rows():
                for name, value in row.read().items():
                    self._histories.update(name, value, row.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the histories and kinds by name; what is not folded yet is not in it."""
        return {
            name: {
                **history.state_dict(),
                "reduce": self._kinds[name].reduce,
                "smoothing_hint": self._kinds[name].smoothing_hint,
                "is_loss": self._kinds[name].is_loss,
            }
            for name, history in self.histories().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take back the histories of `state_dict`."""
        for name, saved in state.items():
            self._kinds[name] = ScalarKind(
                saved["reduce"], saved["smoothing_hint"], saved["is_loss"]
            )
            self._histories.load(name, saved)

    def __enter__(self) -> EventStorage:
        _entered.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert _entered[-1] is self
        _entered.pop()


_entered: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """Return the EventStorage entered last; RuntimeError outside of any."""
    if not _entered:
        raise RuntimeError("no EventStorage here: use it inside `with EventStorage(0) as storage:`")
    return _entered[-1]
