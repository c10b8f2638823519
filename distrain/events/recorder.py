"""Scalars of this rank: put by name, one row per iteration, not reduced over ranks yet."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from distrain.events.pending import (
    LOSS,
    OPERATIONS,
    Operation,
    ScalarKind,
    ScalarRow,
    detached_copy,
    stack,
)
from distrain.log import logger

_FLOATS, _TENSORS = {float}, {Tensor}
_ROW_KEY = "iteration"  # of a row in metrics.jsonl and metrics.csv
_MAX_CHECKED_CALLS = 1000  # sets of arguments of put_scalars that are remembered as checked
_MAX_PENDING_ROWS = 1000  # of a storage without a trainer


class ScalarRecorder(ABC):
    """The part of an EventStorage that scalars are put into.

    Attributes:
        kinds: the settings of every scalar ever put, by name.
        is_reduced_by_trainer: rows wait for `take_rows`.
    """

    def __init__(self, start_iter: int) -> None:
        self.kinds: dict[str, ScalarKind] = {}
        self.is_reduced_by_trainer = False
        self._iter = start_iter
        self._prefix = ""
        self._loaded: set[str] = set()  # names whose kind is that of a checkpoint
        self._checked_calls: set[tuple[object, ...]] = set()
        self._row = ScalarRow(start_iter)
        self._rows: list[ScalarRow] = [self._row]
        self._taken: list[ScalarRow] = []  # rows of the current iteration that were taken already
        self._left_out: set[str] | None = None  # names put inside of `scalars_dropped`
        self._dropped: set[str] = set()  # names reported by it

    @abstractmethod
    def _fold(self) -> None:
        """Move rows into the histories, unless a trainer reduces them."""

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
                if not self.is_reduced_by_trainer and len(self._rows) > _MAX_PENDING_ROWS:
                    self._fold()
                self._row = ScalarRow(iteration)
                self._rows.append(self._row)
            else:
                row.iteration = iteration

    def step(self) -> None:
        """Advance to the next iteration."""
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
            name: prefixed by the current `name_scope`.
            value: a number, or a tensor with one element on any device.
            smoothing_hint: whether writers may show a median over iterations.
            reduce: the operation over ranks; "local" is not reduced: rank 0's value is shown.
            count: number of samples that the value stands for: its weight in the mean over ranks.

        Raises:
            ValueError: the tensor has more than one element, the operation does not exist, the
                count is below 0 or not finite, or the name is "iteration" or was put with other
                settings before.
        """
        name = self._prefix + name
        if self._left_out is not None:
            self._left_out.add(name)
            return
        kind = self.kinds.get(name)
        if kind is None or kind[0] != reduce or kind[1] != smoothing_hint:
            self._declare(name, ScalarKind(reduce, bool(smoothing_hint)))
        if not self.is_reduced_by_trainer and name in self._row:
            self._fold()
        row = self._row
        if value.__class__ is float:
            row.floats[name] = value
            if row.tensors:
                row.tensors.pop(name, None)
        elif isinstance(value, Tensor):
            row.put_block(detached_copy(name, value), name)
        else:
            row.put_float(name, float(value))
        if count is not None:
            row.counts[name] = _checked_count(name, count)
        elif row.counts:
            row.counts.pop(name, None)  # of an earlier put

    def put_scalars(
        self,
        *,
        smoothing_hint: bool = True,
        reduce: Operation = "mean",
        count: float | None = None,
        **scalars: float | Tensor,
    ) -> None:
        """Put several scalars with the same settings: `put_scalars(loss=0.5, accuracy=0.9)`.

        All tensors among them are copied in one operation. Arguments and errors: see `put_scalar`.
        """
        if self._prefix:
            scalars = {self._prefix + name: value for name, value in scalars.items()}
        if self._left_out is not None:
            self._left_out.update(scalars)
            return
        call = (reduce, smoothing_hint, *scalars)
        if call not in self._checked_calls:
            for name in scalars:
                self._declare(name, ScalarKind(reduce, bool(smoothing_hint)))
            if len(self._checked_calls) >= _MAX_CHECKED_CALLS:
                self._checked_calls.clear()
            self._checked_calls.add(call)
        if not self.is_reduced_by_trainer and any(name in self._row for name in scalars):
            self._fold()
        row, types = self._row, set(map(type, scalars.values()))
        if types == _TENSORS:
            row.put_block(stack(scalars), *scalars)  # type: ignore[arg-type]
        elif types == _FLOATS and row.tensors.keys().isdisjoint(scalars.keys()):
            row.floats.update(scalars)  # type: ignore[arg-type]
        else:
            tensors = {n: value for n, value in scalars.items() if isinstance(value, Tensor)}
            if tensors:
                row.put_block(stack(tensors), *tensors)
            for name, value in scalars.items():
                if name not in tensors:
                    row.put_float(name, float(value))
        if count is not None:
            weight = _checked_count(", ".join(scalars), count)
            row.counts.update(dict.fromkeys(scalars, weight))
        elif row.counts:
            for name in scalars:
                row.counts.pop(name, None)

    def put_losses(
        self, losses: Mapping[str, Tensor], counts: Mapping[str, float] | None = None
    ) -> None:
        """Put losses: training stops on all ranks if one is not finite on any rank.

        Args:
            losses: by name, tensors with one element.
            counts: weights in the mean over ranks, of the names whose weight is not 1.
        """
        if self._left_out is not None:
            self._left_out.update(self._prefix + name for name in losses)
            return
        if not self.is_reduced_by_trainer and not self._row.is_empty():
            self._fold()
        row, prefix = self._row, self._prefix
        for name, loss in losses.items():
            name = prefix + name
            if self.kinds.get(name) is not LOSS:
                self._declare(name, LOSS)
            # the result of an operation has memory of its own, which is not overwritten later
            is_new = not loss.is_leaf and not loss._is_view()
            block = loss.detach() if is_new else detached_copy(name, loss)
            row.put_block(block, name)
        if counts:
            row.counts.update({prefix + name: count for name, count in counts.items()})

    def _declare(self, name: str, kind: ScalarKind) -> None:
        if kind.reduce not in OPERATIONS:
            expected = ", ".join(OPERATIONS)
            raise ValueError(f"{name}: reduce={kind.reduce!r}: expected one of {expected}")
        if name == _ROW_KEY:  # it would replace that of the row, by which a resumed run cuts them
            raise ValueError(f"{name}: the iteration of each row has that name; use another name")
        known = self.kinds.setdefault(name, kind)
        # a resumed run may treat a name as a loss, or no more, as grad_norm with other settings
        is_other = known[:2] != kind[:2] if name in self._loaded else known != kind
        if is_other:
            raise ValueError(f"{name}: put as {kind}, but before as {known}; use another name")
        self._loaded.discard(name)
        self.kinds[name] = kind  # LOSS itself: `put_losses` compares by identity

    def take_rows(self) -> list[ScalarRow]:
        """Return the rows put so far and remove them."""
        taken = self._rows
        if self._row.is_empty():
            taken = taken[:-1]
        newest_first = [*reversed(taken), *self._taken]
        self._taken = [row for row in newest_first if row.iteration == self._iter]
        self._row = ScalarRow(self._iter)
        self._rows = [self._row]
        return taken

    def put_now(self, name: str) -> float | None:
        """Return the value that this rank put in the current iteration, or None."""
        for row in (self._row, *self._taken):
            if row.iteration == self._iter and name in row:
                return row.read()[name]
        return None

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prefix the names put inside the `with` by `name/`."""
        old = self._prefix
        self._prefix = f"{old}{name.rstrip('/')}/"
        try:
            yield
        finally:
            self._prefix = old

    @contextmanager
    def scalars_dropped(self) -> Iterator[None]:
        """Drop the scalars put inside the `with`: they would replace those of the iteration.

        All that was put outside can be read. Names that are never put outside are reported once.
        """
        before, left_out = self._left_out, set[str]()
        self._left_out = left_out
        try:
            yield
        finally:
            self._left_out = before
        new = left_out - self.kinds.keys() - self._dropped
        if self.kinds and new:  # before the first step no name is known
            logger.warning(
                "scalars put in an evaluation are left out: %s; return them from the model's "
                "metrics",
                ", ".join(sorted(new)),
            )
            self._dropped |= new


def _checked_count(name: str, count: float) -> float:
    """Return the weight of a value: below 0 or NaN it would be left out without a word."""
    weight = float(count)
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}: count={weight}: expected a finite number >= 0")
    return weight
