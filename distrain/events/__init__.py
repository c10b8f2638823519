"""Scalars, images and histograms: recorded, reduced over ranks, kept in histories."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.events.history import HistoryBuffer
    from distrain.events.storage import EventStorage, get_event_storage

_MODULE_OF = {
    "EventStorage": "storage",
    "HistoryBuffer": "history",
    "get_event_storage": "storage",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "EventStorage",
    "HistoryBuffer",
    "get_event_storage",
]
