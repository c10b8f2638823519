"""Writer: base class of the outputs of a run; Row: the values of one write period."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distrain.events.histogram import Histogram

Scalars = Mapping[str, tuple[float, int]]
"""Name -> (value, the iteration that it belongs to)."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a writer is opened for.

    Attributes:
        run_dir: the run folder.
        start_iteration: the first iteration of the rows that follow. An interrupted attempt may
            have written it and later ones, which are trained again: drop them.
        conf: the configuration, its secrets masked; empty where a script has none.
        iters_per_epoch: iterations per epoch of a run whose length is given in epochs.
        changes: a line per key that a start of the run has changed, oldest first.
    """

    run_dir: Path
    start_iteration: int = 0
    conf: Mapping[str, Any] = field(default_factory=dict)
    iters_per_epoch: float | None = None
    changes: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """The values of one write period.

    Attributes:
        iteration: index of its last iteration: the number of finished iterations - 1.
        max_iter: number of iterations of the whole run.
        scalars: the newest value of each name.
        images: (name, (C, H, W) or (H, W) array of uint8 or of floats in [0, 1], iteration).
        histograms: (name, counts in bins, iteration).
        more_follow: another row is already queued; the writer need not flush.
        new: the scalars that no earlier row held, in the order of `scalars`; set by the
            BackgroundWriter. One put once in 1,000 iterations is in `scalars` of each later row.
    """

    iteration: int
    max_iter: int
    scalars: Scalars
    images: Sequence[tuple[str, NDArray[Any], int]] = ()
    histograms: Sequence[tuple[str, Histogram, int]] = ()
    more_follow: bool = False
    new: Scalars = field(default_factory=dict)


class Writer:
    """An output of a run, on rank 0; the methods that a subclass does not override do nothing.

    `__init__` takes the settings of `hooks.writer.writers.NAME`; files and connections are opened
    in `open`, in the training thread. The other methods run in one thread of their own, one call at
    a time, so they may be slow. An error costs a warning and not the run, and the next row comes
    all the same.

    Attributes:
        is_remote: whether its methods may wait for another machine, as those of a tracker: it gets
            a thread and a queue of its own.
    """

    is_remote: ClassVar[bool] = False

    def open(self, run: RunInfo) -> None:
        """Open the output; called once, before the first row. ConfigError ends the run."""

    def write(self, row: Row) -> None:
        """Write one row."""

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Mark the run as finished; called after the last row, if all iterations are done.

        Args:
            metrics: the latest values; without learning rates, timing and hardware metrics.
        """

    def close(self) -> None:
        """Write pending rows and close; called once, last, also when training failed."""
