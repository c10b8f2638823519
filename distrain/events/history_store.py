"""Histories of all scalars; reduced windows are buffered and merged on first access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.events.history import Floats, HistoryBuffer, Ints
from distrain.events.pending import ScalarKind

_MAX_WAITING = 1000  # iterations per set of names, before they move into the histories


class Block(NamedTuple):
    """Values of K scalars at the same n iterations, oldest first."""

    names: tuple[str, ...]
    values: Floats  # (n, K)
    iterations: Ints  # (n,)


class Histories:
    """One HistoryBuffer per scalar.

    The scalars of a window arrive as one block, and rows are read from there: a row of 300 scalars
    costs one sort, not 300 appends and 300 medians. The blocks move into the buffers on access to
    these, which is at checkpoints in most runs.

    Args:
        kinds: the settings of every scalar; a live view.
    """

    def __init__(self, kinds: Mapping[str, ScalarKind]) -> None:
        self._kinds = kinds
        self._hints_of: dict[tuple[str, ...], NDArray[np.bool_]] = {}
        self._buffers: dict[str, HistoryBuffer] = {}
        self._waiting: dict[tuple[str, ...], list[Block]] = {}  # no name is in two of the keys
        # cached result of `until` for scalars without waiting blocks
        self._settled: dict[str, tuple[float, int]] = {}
        self._is_settled_valid = True
        self._settled_from = -1  # the first iteration that the cache is valid for
        self._settled_window = 0  # iterations of its medians

    def append(self, block: Block) -> None:
        """Append a block; O(1) if its names are those of an earlier block."""
        waiting = self._waiting.get(block.names)
        if waiting is None:
            if not all(names.isdisjoint(block.names) for names in map(set, self._waiting)):
                self._settle()
            self._is_settled_valid = False
        elif len(waiting) * len(waiting[-1].iterations) > _MAX_WAITING:
            # neither the new block nor those of other names: these are read soon
            self._move(block.names, waiting)
            waiting.clear()
        self._waiting.setdefault(block.names, []).append(block)

    def update(self, name: str, value: float, iteration: int) -> None:
        """Append one value to one history."""
        self._settle()
        self._buffer(name).update(value, iteration)
        self._is_settled_valid = False

    def buffers(self) -> dict[str, HistoryBuffer]:
        """Return all histories by name."""
        self._settle()
        return self._buffers

    def latest_iteration(self, name: str) -> int:
        """Return the iteration of a scalar's newest value; -1 if there is none."""
        for names, waiting in self._waiting.items():
            if name in names:
                return int(waiting[-1].iterations[-1])
        return self._buffers[name].latest_iteration() if name in self._buffers else -1

    def load(self, name: str, state: Mapping[str, object]) -> None:
        """Restore the history of one scalar."""
        self._settle()
        self._buffer(name).load_state_dict(state)
        self._is_settled_valid = False

    def until(self, iteration: int, *, window_size: int) -> dict[str, tuple[float, int]]:
        """Return every scalar as of an iteration; see `EventStorage.scalars_until`."""
        found = self._until_in_buffers(iteration, window_size)
        for blocks in self._waiting.values():
            found.update(self._until_in_blocks(blocks, iteration, window_size))
        return found

    def _until_in_blocks(
        self, blocks: Sequence[Block], iteration: int, window_size: int
    ) -> dict[str, tuple[float, int]]:
        """Return `until` for the scalars of some blocks, oldest first."""
        hints = self._hints(blocks[0].names)
        num = window_size if hints.any() else 1
        names, values, iterations = _newest(blocks, iteration, num)
        if len(values) < num:  # the buffers may hold some of the window
            found: dict[str, tuple[float, int]] = {}
            for column, name in enumerate(names):
                newest = Block((name,), values[:, column], iterations)
                found |= self._continued(newest, iteration, window_size)
            return found
        shown = values[-1]
        if num > 1:
            start = _start(iterations, iteration, num)
            shown = np.where(hints, medians(values[start:]), shown)
        return dict(zip(names, zip(shown.tolist(), repeat(int(iterations[-1]))), strict=False))

    def until_each(
        self, iterations: Sequence[int], *, window_size: int
    ) -> list[dict[str, tuple[float, int]]]:
        """Return `until` per rising iteration; at the cost of one if `window_size` apart."""
        settled = self._until_in_buffers(iterations[-1], window_size)
        if not self._is_settled_valid or iterations[0] < self._settled_from:
            return [self.until(iteration, window_size=window_size) for iteration in iterations]
        found = [dict(settled) for _ in iterations]
        for names, blocks in self._waiting.items():
            windows = _windows(blocks, iterations, window_size)
            if windows is None:
                for row, iteration in zip(found, iterations, strict=True):
                    row.update(self._until_in_blocks(blocks, iteration, window_size))
                continue
            shown = np.where(self._hints(names), medians(windows), windows[-1])  # (num, K)
            for row, values, iteration in zip(found, shown.tolist(), iterations, strict=True):
                row.update(zip(names, zip(values, repeat(iteration)), strict=False))
        return found

    def _continued(
        self, newest: Block, iteration: int, window_size: int
    ) -> dict[str, tuple[float, int]]:
        """Return `until` for one scalar whose buffer holds the values before the newest ones."""
        [name] = newest.names
        values, iterations = newest.values, newest.iterations
        if name in self._buffers:
            before, their_iterations = self._buffers[name].arrays()
            end = int(np.searchsorted(their_iterations, iteration, side="right"))
            kept = slice(_start(their_iterations[:end], iteration, window_size), end)
            values = np.concatenate([before[kept], values])
            iterations = np.concatenate([their_iterations[kept], iterations])
        num = window_size if self._kinds[name].smoothing_hint else 1
        return _latest(name, values, iterations, iteration, num)

    def _until_in_buffers(self, iteration: int, window_size: int) -> dict[str, tuple[float, int]]:
        """Return `until` for scalars without waiting blocks; cached while it cannot change."""
        if window_size != self._settled_window:
            self._is_settled_valid, self._settled_window = False, window_size
        if self._is_settled_valid and iteration >= self._settled_from:
            return dict(self._settled)
        waiting = {name for names in self._waiting for name in names}
        found: dict[str, tuple[float, int]] = {}
        settled_from = -1
        for name, buffer in self._buffers.items():
            if name not in waiting:
                values, iterations = buffer.arrays()
                num = window_size if self._kinds[name].smoothing_hint else 1
                found |= _latest(name, values, iterations, iteration, num)
                if len(iterations):  # windows of later iterations have no value of it
                    settled_from = max(settled_from, int(iterations[-1]) + num - 1)
        if iteration >= settled_from:
            self._settled, self._is_settled_valid = found, True
            self._settled_from = settled_from
        return dict(found)

    def _hints(self, names: tuple[str, ...]) -> NDArray[np.bool_]:
        """Return (K,) flags of the scalars that are shown as a median."""
        hints = self._hints_of.get(names)
        if hints is None:
            self._hints_of = {n: h for n, h in self._hints_of.items() if n in self._waiting}
            hints = np.array([self._kinds[name].smoothing_hint for name in names])
            self._hints_of[names] = hints
        return hints

    def _settle(self) -> None:
        """Move all waiting blocks into the buffers."""
        if not self._waiting:
            return
        for names, blocks in self._waiting.items():
            self._move(names, blocks)
        self._waiting = {}
        self._is_settled_valid = False

    def _move(self, names: tuple[str, ...], blocks: Sequence[Block]) -> None:
        """Append waiting blocks to the buffers of their names."""
        values = np.concatenate([block.values for block in blocks]).T.copy()  # (K, n)
        iterations = np.concatenate([block.iterations for block in blocks])
        for name, column in zip(names, values, strict=True):
            self._buffer(name).extend(column, iterations)

    def _buffer(self, name: str) -> HistoryBuffer:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = HistoryBuffer()
        return buffer


def _newest(blocks: Sequence[Block], iteration: int, num: int) -> Block:
    """Return the newest `num` values up to an iteration, or fewer if the blocks hold fewer.

    Args:
        blocks: of the same names, oldest first, not empty.
        iteration: later values are ignored.
        num: number of values.
    """
    taken: list[Block] = []
    for block in reversed(blocks):
        end = len(block.iterations)
        if block.iterations[-1] > iteration:
            end = int(np.searchsorted(block.iterations, iteration, side="right"))
        start = max(0, end - num)
        taken.append(Block(block.names, block.values[start:end], block.iterations[start:end]))
        num -= end - start
        if num <= 0:
            break
    if len(taken) == 1:
        return taken[0]
    taken.reverse()
    return Block(
        blocks[0].names,
        np.concatenate([block.values for block in taken]),
        np.concatenate([block.iterations for block in taken]),
    )


def _windows(blocks: Sequence[Block], iterations: Sequence[int], size: int) -> Floats | None:
    """Return the (size, num, K) values of `num` windows by their last iterations, `size` apart.

    None if an iteration has no value, or two.
    """
    num = len(iterations) * size
    newest = _newest(blocks, iterations[-1], num)
    if (
        len(newest.iterations) != num
        or iterations[-1] - iterations[0] != num - size
        or newest.iterations[0] != iterations[0] - size + 1
        or newest.iterations[-1] != iterations[-1]
        or (np.diff(newest.iterations) != 1).any()
    ):
        return None
    return newest.values.reshape(len(iterations), size, -1).transpose(1, 0, 2)


def _latest(
    name: str, values: Floats, iterations: Ints, iteration: int, num: int
) -> dict[str, tuple[float, int]]:
    """Return one scalar's median over `num` iterations, by its name; for 1 the newest value."""
    end = int(np.searchsorted(iterations, iteration, side="right"))
    if not end:
        return {}
    start = _start(iterations[:end], iteration, num) if num > 1 else end - 1
    return {name: (medians(values[start:end, None]).item(), int(iterations[end - 1]))}


def _start(iterations: Ints, last: int, num: int) -> int:
    """Return the first position of a window's values, at most that of the newest value.

    Args:
        iterations: (n,) of the values, none later than `last`.
        last: the last iteration of the window.
        num: number of iterations in it.
    """
    return max(0, min(len(iterations) - 1, int(np.searchsorted(iterations, last - num, "right"))))


def medians(values: Floats) -> Floats:
    """Return the (..., K) medians of (n, ..., K) values; NaN where one is NaN."""
    # np.median takes several times as long for windows of twenty values
    rising = np.sort(values, axis=0)  # NaN comes last
    middle = len(rising) // 2
    found: Floats = rising[middle]
    if len(rising) % 2 == 0:
        with np.errstate(invalid="ignore"):  # inf - inf
            found = (rising[middle - 1] + found) / 2
    return np.where(np.isnan(rising[-1]), np.nan, found)
