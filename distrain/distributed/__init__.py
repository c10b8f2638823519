"""Ranks, collectives, and how a model is spread over the ranks."""

from distrain.distributed.ddp import DDP
from distrain.distributed.fsdp import FSDP
from distrain.distributed.gather import gather_with_gradients
from distrain.distributed.ranks import Topology, process_group, topology
from distrain.distributed.strategy import Strategy

__all__ = [
    "DDP",
    "FSDP",
    "Strategy",
    "Topology",
    "gather_with_gradients",
    "process_group",
    "topology",
]
