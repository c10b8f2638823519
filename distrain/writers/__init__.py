"""Output of scalars: TensorBoard, JSON lines, console."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.writers.base import Row, Writer

_MODULE_OF = {
    "Row": "base",
    "Writer": "base",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "Row",
    "Writer",
]
