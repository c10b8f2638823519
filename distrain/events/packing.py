"""Pack a window of scalars into two all-reduce buffers, and unpack the results.

    sums      (2 * T * A,) float64   value * weight, then weight, of the additive scalars
    extremes  (T * E + 2 * K,) int64   exact values of the max and min scalars, then the largest and
                                       the smallest mean over the window of every scalar, with ranks

with T iterations, A scalars of operation mean or sum, E of max or min, and K = A + E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.events.float_encoding import ordered, split_rank, unordered, with_rank
from distrain.events.history import Floats, Ints
from distrain.events.history_store import Block
from distrain.events.pending import RowGroup, ScalarKind, ScalarRow
from distrain.events.storage import Spread

_ABSENT = np.iinfo(np.int64).min
_MAX_LAYOUTS = 1000  # sets of names that are remembered


class _Layout(NamedTuple):
    """Positions of the scalars of a row, by their destination."""

    known: Ints
    columns: Ints  # of the known scalars
    at_column: Ints | None  # position per column, if the row has all of them
    local: Ints  # scalars that are not reduced
    local_names: tuple[str, ...]
    unknown: list[int]  # scalars without a column, whose names have to be exchanged first


@dataclass
class Unrolled:
    """The rows of one rank as arrays."""

    # (2, T, K) values, then their weights in a mean, 1 by default; both are 0 where one is absent
    packed: Floats
    weighted: bool = False  # whether a weight was given
    local: list[Block] = field(default_factory=list)  # scalars that are not reduced
    held: list[ScalarRow] = field(default_factory=list)  # values of names without a column


class Columns:
    """The column of each scalar in the buffers; the same on all ranks."""

    def __init__(self) -> None:
        self.kinds: dict[str, ScalarKind] = {}  # in the order of the columns
        self._index: dict[str, int] = {}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._spreads: Ints = np.empty((2, 0), dtype=np.int64)  # newest largest and smallest keys
        self.learn({})

    def index(self, name: str) -> int:
        """Return the column of a scalar; KeyError if it has none."""
        return self._index[name]

    def learn(self, kinds: Mapping[str, ScalarKind]) -> None:
        """Append columns for new names, in alphabetical order."""
        new = sorted(kinds.keys() - self._index.keys())
        for name in new:
            self.kinds[name] = kinds[name]
            self._index[name] = len(self._index)
        self._layouts = {}
        absent = np.full((2, len(new)), _ABSENT)
        self._spreads = np.concatenate([self._spreads, absent], axis=1)
        operations = np.array([kind.reduce for kind in self.kinds.values()], dtype=str)
        self._is_extreme = (operations == "max") | (operations == "min")  # (K,)
        self._is_mean = operations[~self._is_extreme] == "mean"  # (A,)
        self._signs = np.where(operations[self._is_extreme] == "min", -1.0, 1.0)  # (E,)
        self._extreme_names = tuple(compress(self.kinds, self._is_extreme.tolist()))
        self._additive_names = tuple(compress(self.kinds, (~self._is_extreme).tolist()))

    def unknown(
        self, groups: Iterable[RowGroup], kinds: Mapping[str, ScalarKind]
    ) -> dict[str, ScalarKind]:
        """Return the kinds of the names that are to be reduced but have no column yet."""
        return {
            group.names[position]: kinds[group.names[position]]
            for group in groups
            for position in self._layout(group.names, kinds).unknown
        }

    def _layout(self, names: tuple[str, ...], kinds: Mapping[str, ScalarKind]) -> _Layout:
        layout = self._layouts.get(names)
        if layout is None:
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.clear()
            columns = np.array([self._index.get(name, -1) for name in names], dtype=np.int64)
            is_local = np.array([kinds[name].reduce == "local" for name in names], dtype=bool)
            known, local = np.flatnonzero(columns >= 0), np.flatnonzero(is_local)
            unknown = np.flatnonzero((columns < 0) & ~is_local).tolist()
            local_names = tuple(compress(names, is_local.tolist()))
            at_column = None
            if len(known) == len(self._index):
                at_column = known[np.argsort(columns[known])]
            layout = _Layout(known, columns[known], at_column, local, local_names, unknown)
            self._layouts[names] = layout
        return layout

    def unroll(
        self,
        groups: Iterable[RowGroup],
        kinds: Mapping[str, ScalarKind],
        *,
        since: int,
        last: int,
    ) -> Unrolled:
        """Return the rows of one rank, of iterations in [since, last], as arrays."""
        unrolled = Unrolled(np.zeros((2, last - since + 1, len(self.kinds))))
        values, weights = unrolled.packed
        local: list[Block] = []
        for group in groups:
            layout = self._layout(group.names, kinds)
            iterations = np.array([row.iteration for row in group.rows])
            at = iterations - since
            if layout.at_column is not None:  # the usual case, and the fast one
                values[at] = group.values[:, layout.at_column]
                weights[at] = 1.0
            else:
                values[at[:, None], layout.columns] = group.values[:, layout.known]
                weights[at[:, None], layout.columns] = 1.0
            if layout.local_names:
                local.append(Block(layout.local_names, group.values[:, layout.local], iterations))
            if layout.unknown:
                unrolled.held += [
                    _held(row, group.names, row_values, layout.unknown)
                    for row, row_values in zip(group.rows, group.values, strict=True)
                ]
            for row in group.rows:
                if row.counts:
                    self._weigh(row.counts, weights[row.iteration - since])
                    unrolled.weighted = True
        if unrolled.weighted:
            values[weights <= 0] = 0.0  # the mean of no samples is NaN, and has no weight
        unrolled.local = _merged(local, since=since, last=last)
        return unrolled

    def _weigh(self, counts: Mapping[str, float], weights: Floats) -> None:
        """Write the counts into the (K,) weights of an iteration."""
        for name, count in counts.items():
            if name in self._index and self.kinds[name].reduce == "mean":
                weights[self._index[name]] = count

    def pack_sums(self, unrolled: Unrolled) -> Floats:
        """Return the buffer to sum over ranks; it usually shares the memory of `unrolled`."""
        packed = unrolled.packed
        if self._extreme_names:
            packed = packed[:, :, ~self._is_extreme]
        if unrolled.weighted:
            packed[0] *= packed[1]
        return packed.reshape(-1)

    def pack_extremes(self, unrolled: Unrolled, rank: int) -> Ints:
        """Return the buffer of the maximum over ranks."""
        values, weights = unrolled.packed
        counts = (weights > 0).sum(axis=0)  # (K,)
        keys = with_rank(values.sum(axis=0) / np.maximum(counts, 1), rank)  # (2, K)
        if not counts.all():
            keys[:, counts == 0] = _ABSENT
        if not self._extreme_names:
            return keys.reshape(-1)
        exact = ordered(values[:, self._is_extreme] * self._signs)  # (T, E)
        exact[weights[:, self._is_extreme] <= 0] = _ABSENT
        return np.concatenate([exact.ravel(), keys.ravel()])

    def unpack_sums(self, sums: Sequence[Floats], iterations: Sequence[Ints]) -> Iterator[Block]:
        """Return the reduced additive scalars.

        Args:
            sums: buffers of consecutive windows.
            iterations: (T,) per window.
        """
        if self._additive_names:
            at = np.concatenate(iterations)  # (T,) of all windows
            shaped = [s.reshape(2, len(i), -1) for s, i in zip(sums, iterations, strict=True)]
            values, weights = np.concatenate(shaped, axis=1)
            present = weights > 0
            if present.all() and self._is_mean.all():
                values /= weights  # several times as fast as with a mask
            else:
                np.divide(values, weights, out=values, where=present & self._is_mean)
            yield from _blocks(self._additive_names, values, present, at)

    def unpack_extremes(
        self, extremes: Sequence[Ints], iterations: Sequence[Ints]
    ) -> Iterator[Block]:
        """Return the reduced max and min scalars; keep the spreads.

        Args:
            extremes: buffers of consecutive windows.
            iterations: (T,) per window.
        """
        parts = []
        for vector, at in zip(extremes, iterations, strict=True):
            num = len(at) * len(self._extreme_names)
            newest = vector[num:].reshape(2, -1)
            self._spreads = np.where(newest != _ABSENT, newest, self._spreads)
            parts.append(vector[:num].reshape(len(at), -1))
        if self._extreme_names:
            keys = np.concatenate(parts)
            values = unordered(keys) * self._signs
            at = np.concatenate(iterations)
            yield from _blocks(self._extreme_names, values, keys != _ABSENT, at)

    def spread(self, name: str) -> Spread:
        """Return the spread of a scalar over ranks in its last window; KeyError if unknown."""
        keys = self._spreads[:, self._index[name]]
        if keys[0] == _ABSENT:
            raise KeyError(name)
        largest, max_rank = split_rank(keys[0])
        negative, min_rank = split_rank(keys[1])
        return Spread(0.0 - negative, min_rank, largest, max_rank)


def _held(
    row: ScalarRow, names: Sequence[str], values: Floats, positions: Sequence[int]
) -> ScalarRow:
    """Return a row with the scalars at some positions of a row."""
    floats = {names[position]: float(values[position]) for position in positions}
    counts = {name: row.counts[name] for name in floats if name in row.counts}
    return ScalarRow(row.iteration, floats, counts=counts)


def _merged(blocks: Sequence[Block], *, since: int, last: int) -> list[Block]:
    """Return the same values in blocks that share no name, in the order of iterations."""
    if len(blocks) < 2:
        return list(blocks)
    names = tuple(dict.fromkeys(name for block in blocks for name in block.names))
    column = {name: number for number, name in enumerate(names)}
    values = np.zeros((last - since + 1, len(names)))
    present = np.zeros(values.shape, dtype=bool)
    for block in blocks:
        columns = [column[name] for name in block.names]
        values[(block.iterations - since)[:, None], columns] = block.values
        present[(block.iterations - since)[:, None], columns] = True
    return list(_blocks(names, values, present, np.arange(since, last + 1)))


def _blocks(
    names: tuple[str, ...], values: Floats, present: NDArray[np.bool_], iterations: Ints
) -> Iterator[Block]:
    """Return the scalars as blocks: those with the same iterations share one.

    Args:
        names: of the K scalars.
        values: (T, K).
        present: (T, K) whether a value was put.
        iterations: (T,); those without values, as the one before a window, are left out.
    """
    if len(iterations) and present.all():  # the usual case
        yield Block(names, values, iterations)
        return
    used = np.logical_or.reduce(present, axis=1)
    if not used.all():
        values, present, iterations = values[used], present[used], iterations[used]
    if not len(iterations):
        return
    complete: NDArray[np.bool_] = np.logical_and.reduce(present, axis=0)
    if complete.any():
        yield Block(tuple(compress(names, complete.tolist())), values[:, complete], iterations)
    by_presence: dict[bytes, list[int]] = {}
    for column in np.flatnonzero(present.any(axis=0) & ~complete).tolist():
        by_presence.setdefault(present[:, column].tobytes(), []).append(column)
    for columns in by_presence.values():
        rows = present[:, columns[0]]
        block_names = tuple(names[column] for column in columns)
        yield Block(block_names, values[rows][:, columns], iterations[rows])
