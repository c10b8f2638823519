"""Checkpoints: saved in the background, verified, loaded, kept and deleted."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.checkpoint.catalog import Found, describe, find_all
    from distrain.checkpoint.format import CheckpointDamaged
    from distrain.checkpoint.store import Best, CheckpointStore, SaveFailed

_MODULE_OF = {
    "Best": "store",
    "CheckpointDamaged": "format",
    "CheckpointStore": "store",
    "Found": "catalog",
    "SaveFailed": "store",
    "describe": "catalog",
    "find_all": "catalog",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "Best",
    "CheckpointDamaged",
    "CheckpointStore",
    "Found",
    "SaveFailed",
    "describe",
    "find_all",
]
