"""How the scalars of one window become two vectors, and what the combined vectors say.

    sums      (2 * T * A,) float64   value * weight, then weight, of the additive scalars
    extremes  (T * E + 2 * K,) int64   exact values of the max and min scalars, then the largest and
                                       the smallest mean over the window of every scalar, with ranks

with T iterations, A scalars of operation mean or sum, E of max or min, and K = A + E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from distrain.events import ScalarKind, ScalarRow, Spread
from distrain.history import Floats, Ints
from distrain.ordered import ordered, split_rank, unordered, with_rank

_ABSENT = np.iinfo(np.int64).min


class Series(NamedTuple):
    """Values of one scalar: (n,) floats with their (n,) iterations."""

    name: str
    kind: ScalarKind
    values: Floats
    iterations: Ints


@dataclass
class Unrolled:
    """The rows of one rank, laid out.

    Attributes:
        values: (T, K) floats, 0 where absent.
        weights: (T, K) their weights in a mean, 1 where none was given, 0 where absent.
        local: series that do not travel.
        held: rows of the values whose names have no column yet.
    """

    values: Floats
    weights: Floats
    local: list[Series] = field(default_factory=list)
    held: list[ScalarRow] = field(default_factory=list)


class Columns:
    """Which scalar stands in which column; the same on all ranks."""

    def __init__(self) -> None:
        self.kinds: dict[str, ScalarKind] = {}  # in the order of the columns
        self._index: dict[str, int] = {}
        self._additive: list[int] = []
        self._extreme: list[int] = []
        self._signs: Floats = np.empty(0)  # (E,) -1 for a minimum

    def index(self, name: str) -> int:
        """Return the column of a scalar; KeyError if it has none."""
        return self._index[name]

    def learn(self, kinds: Mapping[str, ScalarKind]) -> None:
        """Give new names their columns, in alphabetical order; known ones keep theirs."""
        for name in sorted(kinds.keys() - self._index.keys()):
            self.kinds[name] = kinds[name]
            self._index[name] = len(self._index)
        self._additive, self._extreme = [], []
        for name, kind in self.kinds.items():
            columns = self._extreme if kind.reduce in ("max", "min") else self._additive
            columns.append(self._index[name])
        names = list(self.kinds)
        self._signs = np.array(
            [-1.0 if self.kinds[names[c]].reduce == "min" else 1.0 for c in self._extreme]
        )

    def unknown(
        self, rows: Iterable[ScalarRow], kinds: Mapping[str, ScalarKind]
    ) -> dict[str, ScalarKind]:
        """Return the kinds of the names in the rows that travel but have no column yet."""
        found: dict[str, ScalarKind] = {}
        names: list[str] = []
        for row in rows:
            if (row_names := list(row.values)) != names:
                names = row_names
                for name in names:
                    if name not in self._index and kinds[name].reduce != "local":
                        found[name] = kinds[name]
        return found

    def unroll(
        self,
        rows: Sequence[ScalarRow],
        kinds: Mapping[str, ScalarKind],
        *,
        since: int,
        last: int,
        read: Mapping[int, Floats],
    ) -> Unrolled:
        """Lay the rows of one rank out.

        Args:
            rows: with iterations in [since, last].
            kinds: of all names in the rows.
            since: the first iteration.
            last: the last iteration.
            read: id of a block that a row points into -> its values on the host.
        """
        shape = (last - since + 1, len(self.kinds))
        unrolled = Unrolled(np.zeros(shape), np.zeros(shape))
        local: dict[str, tuple[list[float], list[int]]] = {}
        names: list[str] = []
        columns = np.empty(0, dtype=np.int64)
        rest: list[int] = []  # positions in the row of what has no column
        for row in rows:
            if (row_names := list(row.values)) != names:  # the usual case: as in the row before
                names = row_names
                all_columns = [self._index.get(name, -1) for name in names]
                rest = [p for p, column in enumerate(all_columns) if column < 0]
                columns = np.array(all_columns, dtype=np.int64)
                known = columns >= 0
                columns = columns[known]
            values = _read_row(row, read)
            t = row.iteration - since
            unrolled.values[t, columns] = values[known] if rest else values
            unrolled.weights[t, columns] = 1.0
            for name, count in row.counts.items():
                if name in self._index and self.kinds[name].reduce == "mean":
                    unrolled.weights[t, self._index[name]] = count
            held = ScalarRow(row.iteration)
            for position in rest:
                name, value = names[position], float(values[position])
                if kinds[name].reduce == "local":
                    pair = local.setdefault(name, ([], []))
                    pair[0].append(value)
                    pair[1].append(row.iteration)
                else:
                    held.values[name] = value
                    if name in row.counts:
                        held.counts[name] = row.counts[name]
            if held.values:
                unrolled.held.append(held)
        unrolled.local = [
            Series(name, kinds[name], np.array(v), np.array(i, dtype=np.int64))
            for name, (v, i) in local.items()
        ]
        return unrolled

    def pack_sums(self, unrolled: Unrolled) -> Floats:
        """Return the vector to sum over ranks."""
        values = unrolled.values[:, self._additive]
        weights = unrolled.weights[:, self._additive]
        weighted = np.where(weights > 0, values * weights, 0.0)
        return np.concatenate([weighted.ravel(), weights.ravel()])

    def pack_extremes(self, unrolled: Unrolled, rank: int) -> Ints:
        """Return the vector whose maximum over ranks is taken."""
        present = unrolled.weights > 0
        exact = ordered(unrolled.values[:, self._extreme] * self._signs)  # (T, E)
        exact[~present[:, self._extreme]] = _ABSENT
        num = present.sum(axis=0)  # (K,)
        total = np.where(present, unrolled.values, 0.0).sum(axis=0)
        means = total / np.maximum(num, 1)
        spread = np.stack([with_rank(means, rank), with_rank(-means, rank)])  # (2, K)
        spread[:, num == 0] = _ABSENT
        return np.concatenate([exact.ravel(), spread.ravel()])

    def unpack_sums(self, sums: Floats, iterations: Ints) -> Iterator[Series]:
        """Return the series of the additive scalars, combined over ranks."""
        weighted, weights = sums.reshape(2, len(iterations), -1)
        whole = np.logical_and.reduce(weights > 0, axis=0)
        names = list(self.kinds)
        for position, column in enumerate(self._additive):
            name, at = names[column], iterations
            kind = self.kinds[name]
            weight, value = weights[:, position], weighted[:, position]
            if not whole[position]:
                here = weight > 0
                weight, value, at = weight[here], value[here], iterations[here]
            if len(value):
                yield Series(name, kind, value / weight if kind.reduce == "mean" else value, at)

    def unpack_extremes(self, extremes: Ints, iterations: Ints) -> Iterator[Series]:
        """Return the series of the max and min scalars, combined over ranks."""
        num = len(iterations) * len(self._extreme)
        keys = extremes[:num].reshape(len(iterations), -1)
        names = list(self.kinds)
        for position, column in enumerate(self._extreme):
            here = keys[:, position] != _ABSENT
            if here.any():
                values = unordered(keys[here, position]) * self._signs[position]
                name = names[column]
                yield Series(name, self.kinds[name], values, iterations[here])

    def unpack_spreads(self, extremes: Ints) -> Iterator[tuple[str, Spread]]:
        """Return for each scalar how its mean over the window differs between ranks."""
        high, low = extremes[len(extremes) - 2 * len(self.kinds) :].reshape(2, -1).tolist()
        for name, max_key, min_key in zip(self.kinds, high, low, strict=True):
            if max_key != _ABSENT:
                largest, max_rank = split_rank(max_key)
                negative, min_rank = split_rank(min_key)
                yield name, Spread(0.0 - negative, min_rank, largest, max_rank)


def read_blocks(rows: Iterable[ScalarRow]) -> list[Tensor]:
    """Return all blocks that the rows point into, in order."""
    return [block for row in rows for block in row.blocks]


def _read_row(row: ScalarRow, read: Mapping[int, Floats]) -> Floats:
    """Return the values of a row, (num_names,)."""
    if not row.blocks:
        return np.fromiter(row.values.values(), np.float64, len(row.values))
    values = [v if isinstance(v, float) else read[id(v[0])][v[1]] for v in row.values.values()]
    return np.array(values)
