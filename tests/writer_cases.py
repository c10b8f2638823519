"""A writer fed in the test's own thread, as the BackgroundWriter feeds it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from distrain.writers.background import NewScalars
from distrain.writers.base import Row, RunInfo, Writer


class Opened:
    """A writer opened for a run; `write` selects the scalars that no earlier row held."""

    def __init__(self, writer: Writer, start: int = 0, **conf: Any) -> None:
        self.writer, self.close, self.finish = writer, writer.close, writer.finish
        self.new_of = NewScalars(start)
        writer.open(RunInfo(Path(), start, conf))

    def write(self, row: Row) -> None:
        self.writer.write(replace(row, new=self.new_of(row.scalars)))
