"""The history of one scalar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.checks import whole

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class HistoryBuffer:
    """The values of one scalar with their iterations, newest last, bounded in length.

    Args:
        max_length: number of newest values kept for `values`, `avg` and `median`; `global_avg`
            includes the older ones.
    """

    def __init__(self, max_length: int = 10_000) -> None:
        self._max_length = whole("max_length", max_length, least=1)
        self._values: Floats = np.empty(16)
        self._iterations: Ints = np.empty(16, dtype=np.int64)
        self._end = 0  # values lie in [max(0, end - max_length), end) of the arrays
        self._count = 0
        self._sum = 0.0

    def update(self, value: float, iteration: int | None = None) -> None:
        """Append one value of an iteration, None: the next one; O(1) on average."""
        if iteration is None:
            iteration = int(self._iterations[self._end - 1]) + 1 if self._end else 0
        self._reserve(1)
        self._values[self._end] = value
        self._iterations[self._end] = iteration
        self._end += 1
        self._count += 1
        self._sum += value

    def extend(self, values: Floats, iterations: Ints) -> None:
        """Append (n,) values, oldest first, with their (n,) iterations."""
        num = len(values)
        self._count += num
        # one by one, so that the sum does not depend on the lengths of the appended parts
        self._sum = float(np.add.accumulate(np.concatenate([[self._sum], values]))[-1])
        values, iterations = values[-self._max_length :], iterations[-self._max_length :]
        self._reserve(len(values))
        self._values[self._end : self._end + len(values)] = values
        self._iterations[self._end : self._end + len(values)] = iterations
        self._end += len(values)

    def _reserve(self, num: int) -> None:
        """Make room at the end: grow up to twice the bound, then drop older values."""
        if self._end + num <= len(self._values):
            return
        start = max(0, self._end - self._max_length)
        kept = self._end - start
        size = max(16, min(2 * (kept + num), 2 * self._max_length), kept + num)
        for name in ("_values", "_iterations"):
            old = getattr(self, name)
            new = np.empty(size, dtype=old.dtype)
            new[:kept] = old[start : self._end]
            setattr(self, name, new)
        self._end = kept

    def arrays(self) -> tuple[Floats, Ints]:
        """Return views of the values (n,) and their iterations (n,), oldest first."""
        kept = slice(max(0, self._end - self._max_length), self._end)
        return self._values[kept], self._iterations[kept]

    def latest(self) -> float:
        """Return the newest value; IndexError if there is none."""
        return float(self._values[self._last()])

    def latest_iteration(self) -> int:
        """Return the iteration of the newest value; IndexError if there is none."""
        return int(self._iterations[self._last()])

    def _last(self) -> int:
        if not self._end:
            raise IndexError("the history is empty")
        return self._end - 1

    def values(self) -> list[tuple[float, int]]:
        """Return the kept `(value, iteration)` pairs, oldest first."""
        values, iterations = self.arrays()
        return list(zip(values.tolist(), iterations.tolist(), strict=True))

    def avg(self, window_size: int) -> float:
        """Return the mean of the newest `window_size` values (of all, if there are fewer)."""
        return float(self.arrays()[0][-window_size:].mean())

    def median(self, window_size: int) -> float:
        """Return the median of the newest `window_size` values (of all, if there are fewer)."""
        return float(np.median(self.arrays()[0][-window_size:]))

    def global_avg(self) -> float:
        """Return the mean of all values ever put."""
        return self._sum / self._count

    def state_dict(self) -> dict[str, Any]:
        """Return the kept values, and count and sum of all."""
        values, iterations = self.arrays()
        return {
            "values": values.copy(),
            "iterations": iterations.copy(),
            "count": self._count,
            "sum": self._sum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self._end = 0
        self.extend(np.asarray(state["values"]), np.asarray(state["iterations"]))
        self._count, self._sum = state["count"], state["sum"]
