"""The global stream of samples and its loaders."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.data.loader import EvalLoader, SampleStream, TrainLoader

_MODULE_OF = {
    "EvalLoader": "loader",
    "SampleStream": "loader",
    "TrainLoader": "loader",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "EvalLoader",
    "SampleStream",
    "TrainLoader",
]
