"""Batches of one rank's part of a data set, from all its readers, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distrain.data.readers import Part, Turns


class PartBatches:
    """Batches of the readers of a rank, in turn; a reader whose part has ended is left out.

    Args:
        answers: of the readers, in the order of the turns.
        turns: requests to the readers.
        readers: their number.
        position: that after a batch, which `of_epoch` has yielded with it.

    Attributes:
        epoch: number of the epoch.
        left_out: samples of the epoch that were read, but are in no batch.
    """

    def __init__(
        self, answers: Iterator[Part], turns: Turns, *, readers: int, position: dict[str, Any]
    ) -> None:
        self._answers, self._turns, self._readers = answers, turns, readers
        self.epoch, self._turn = position["epoch"], position["turn"]
        self._parts = dict(position["parts"])  # reader -> its position; None at its end
        self._held: list[Part] = []
        self.left_out = 0

    def of_epoch(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield the remaining batches of the epoch, each with the position after it."""
        while list(self._parts.values()).count(None) < self._readers:
            part = self._held.pop() if self._held else next(self._answers)
            self._turn += 1
            self._parts[part.reader] = part.position
            if part.batch is None:
                self.left_out += part.size
            else:
                parts = dict(self._parts)
                yield part.batch, {"epoch": self.epoch, "turn": self._turn, "parts": parts}

    def begin_next(self) -> None:
        """Go to the next epoch; batches of this one that readers have in work are left out."""
        self._turns.begin_epoch(self.epoch + 1)
        while not self._held:
            part = next(self._answers)
            if part.epoch > self.epoch:
                self._held = [part]
            else:
                self.left_out += part.size
        self.epoch, self._turn, self._parts = self.epoch + 1, 0, {}
