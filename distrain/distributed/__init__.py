"""Ranks, collectives, and how a model is spread over the ranks."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.distributed.process_group import Topology, process_group, topology

_MODULE_OF = {
    "Topology": "process_group",
    "process_group": "process_group",
    "topology": "process_group",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "Topology",
    "process_group",
    "topology",
]
