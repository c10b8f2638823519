"""Output of scalars: TensorBoard, JSON lines, console."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.writers.background import Row, Writer

_MODULE_OF = {
    "Row": "background",
    "Writer": "background",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "Row",
    "Writer",
]
