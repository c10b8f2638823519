"""The global stream of samples and its loaders."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.data.loader import EvalLoader, Loader, TrainLoader
    from distrain.data.stream import SampleStream

_MODULE_OF = {
    "EvalLoader": "loader",
    "Loader": "loader",
    "SampleStream": "stream",
    "TrainLoader": "loader",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "EvalLoader",
    "Loader",
    "SampleStream",
    "TrainLoader",
]
