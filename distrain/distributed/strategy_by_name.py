"""The strategies by name: `trainer.strategy` and the settings that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from distrain.checks import one_of
from distrain.distributed.comm_hooks import CommHook
from distrain.distributed.ddp import DDP
from distrain.distributed.fsdp import FSDP
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError

StrategyName = Literal["ddp", "fsdp"]


def make_strategy(
    strategy: Strategy | StrategyName,
    *,
    ddp: Mapping[str, Any] | None = None,
    fsdp: Mapping[str, Any] | None = None,
    comm_hook: CommHook = "none",
    comm_options: Mapping[str, Any] | None = None,
) -> Strategy:
    """Return a strategy by its name; one that is built already is returned as it is.

    Args:
        strategy: "ddp" copies the model to each rank, "fsdp" shards it over the ranks.
        ddp: keywords of torch's DistributedDataParallel.
        fsdp: keywords of `FSDP`.
        comm_hook: see `DDP`.
        comm_options: see `DDP`.

    Raises:
        ConfigError: an unknown name, or a setting that does not go with it.
    """
    if not isinstance(strategy, Strategy):
        one_of("trainer.strategy", strategy, ("ddp", "fsdp"))
        if strategy == "ddp":
            return DDP(ddp, comm_hook=comm_hook, comm_options=comm_options)
    if comm_hook != "none":
        raise ConfigError(
            f"trainer.comm_hook={comm_hook}: expected none; trainer.strategy=ddp has it"
        )
    return FSDP(**(fsdp or {})) if isinstance(strategy, str) else strategy
