"""Everything in a run folder but its checkpoints."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.runfolder.folder import RunFolder

_MODULE_OF = {
    "RunFolder": "folder",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "RunFolder",
]
