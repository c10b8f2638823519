"""Row and Writer: the scalars, images and histograms of some iterations, and where they go."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distrain.events.histogram import Histogram

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What one write period brings to the writers.

    Attributes:
        iteration: index of the last iteration in it: the number of finished iterations - 1.
        max_iter: number of iterations of the whole run.
        scalars: name -> (value, the iteration that it belongs to), the newest of each name.
        images: (name, (C, H, W) or (H, W) array of uint8 or of floats in [0, 1], iteration).
        histograms: (name, counts in bins, iteration).
        is_followed: another row comes at once, so a disk may wait for it.
    """

    iteration: int
    max_iter: int
    scalars: Mapping[str, tuple[float, int]]
    images: Sequence[tuple[str, NDArray[Any], int]] = field(default=())
    histograms: Sequence[tuple[str, Histogram, int]] = field(default=())
    is_followed: bool = False


class Writer(Protocol):
    """What writes rows somewhere; it lives on rank 0 only and may take its time.

    Training hands its rows to a `BackgroundWriter`, so `write` and `close` run in a thread of their
    own, one call at a time.
    """

    def write(self, row: Row) -> None:
        """Write one row."""

    def close(self) -> None:
        """Finish; called once, after the last row, also when training failed."""


class NewScalars:
    """Picks the scalars of a row that no earlier row held.

    A scalar put once in a thousand iterations is in every row, with its old iteration. Writers may
    share one: who asks for a row again gets the same answer.

    Args:
        start_iteration: the first iteration of this run; older values were written before it
            was interrupted.
    """

    def __init__(self, start_iteration: int = 0) -> None:
        self._oldest = start_iteration
        self._next: dict[str, int] = {}
        self._row: Row | None = None
        self._new: dict[str, tuple[float, int]] = {}

    def __call__(self, row: Row) -> Mapping[str, tuple[float, int]]:
        """Return name -> (value, iteration) of what is new, in the row's order."""
        if row is self._row:
            return self._new
        known, oldest = self._next, self._oldest
        new = {}
        for name, scalar in row.scalars.items():
            if scalar[1] >= known.get(name, oldest):
                new[name] = scalar
                known[name] = scalar[1] + 1
        self._row, self._new = row, new
        return new
