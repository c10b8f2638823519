"""Ranks, collectives, and how a model is spread over the ranks."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.distributed.ddp import DDP
    from distrain.distributed.fsdp import FSDP
    from distrain.distributed.gather import gather_with_gradients
    from distrain.distributed.ranks import Topology, process_group, topology
    from distrain.distributed.strategy import Strategy

_MODULE_OF = {
    "DDP": "ddp",
    "FSDP": "fsdp",
    "Strategy": "strategy",
    "Topology": "ranks",
    "gather_with_gradients": "gather",
    "process_group": "ranks",
    "topology": "ranks",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "DDP",
    "FSDP",
    "Strategy",
    "Topology",
    "gather_with_gradients",
    "process_group",
    "topology",
]
