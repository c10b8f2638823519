"""FanOut: a list whose new items each of several readers takes once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FanOut(Generic[T]):
    """Items in order, kept until all readers have taken them; without readers, until `clear`."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._taken: list[int] = []  # number of items, per reader

    def reader(self) -> Callable[[], list[T]]:
        """Add a reader: a function that returns the items appended since its last call."""
        number = len(self._taken)
        self._taken.append(0)

        def take() -> list[T]:
            new = self.items[self._taken[number] :]
            self._taken[number] = len(self.items)
            if min(self._taken) == len(self.items):
                self.clear()
            return new

        return take

    def clear(self) -> None:
        """Remove all items."""
        self.items = []
        self._taken = [0] * len(self._taken)
