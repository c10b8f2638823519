"""Outputs of scalars, images and histograms: files, console and trackers."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.writers.base import Row, RunInfo, Writer
    from distrain.writers.console import ConsoleWriter
    from distrain.writers.csv import CsvWriter
    from distrain.writers.json_lines import JsonLinesWriter
    from distrain.writers.mlflow import MlflowWriter
    from distrain.writers.prometheus import PrometheusWriter
    from distrain.writers.tensorboard import TensorBoardWriter
    from distrain.writers.wandb import WandbWriter

_MODULE_OF = {
    "ConsoleWriter": "console",
    "CsvWriter": "csv",
    "JsonLinesWriter": "json_lines",
    "MlflowWriter": "mlflow",
    "PrometheusWriter": "prometheus",
    "Row": "base",
    "RunInfo": "base",
    "TensorBoardWriter": "tensorboard",
    "WandbWriter": "wandb",
    "Writer": "base",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "ConsoleWriter",
    "CsvWriter",
    "JsonLinesWriter",
    "MlflowWriter",
    "PrometheusWriter",
    "Row",
    "RunInfo",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
]
