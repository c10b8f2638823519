"""Outputs of scalars, images and histograms: TensorBoard, JSON lines, console."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.writers.base import Row, RunInfo, Writer
    from distrain.writers.console import ConsoleWriter
    from distrain.writers.json_lines import JsonLinesWriter
    from distrain.writers.tensorboard import TensorBoardWriter

_MODULE_OF = {
    "ConsoleWriter": "console",
    "JsonLinesWriter": "json_lines",
    "Row": "base",
    "RunInfo": "base",
    "TensorBoardWriter": "tensorboard",
    "Writer": "base",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "ConsoleWriter",
    "JsonLinesWriter",
    "Row",
    "RunInfo",
    "TensorBoardWriter",
    "Writer",
]
