"""The writers of a PeriodicWriter to which none are given."""

from __future__ import annotations

from distrain.writers.base import Writer


def default_writers() -> list[Writer]:
    """Return the writers of conf/hooks/default.yaml: TensorBoard, JSON lines and console."""
    # imported here: they take 0.1 s, and only rank 0 has writers
    from distrain.writers.console import ConsoleWriter
    from distrain.writers.json_lines import JsonLinesWriter
    from distrain.writers.tensorboard import TensorBoardWriter

    return [TensorBoardWriter(), JsonLinesWriter(), ConsoleWriter()]
