"""Ranks, collectives, and how a model is spread over the ranks."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.distributed.ranks import Topology, process_group, topology

_MODULE_OF = {
    "Topology": "ranks",
    "process_group": "ranks",
    "topology": "ranks",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "Topology",
    "process_group",
    "topology",
]
