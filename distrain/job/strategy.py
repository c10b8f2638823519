"""Build the strategy that a configuration names."""

from __future__ import annotations

from typing import Any

from distrain.config.instantiate import build_as
from distrain.distributed.strategy import Strategy
from distrain.distributed.strategy_by_name import make_strategy

STRATEGY_KEYS = ("strategy", "ddp", "fsdp", "comm_hook", "comm_options")


def build_strategy(trainer_conf: dict[str, Any]) -> Strategy:
    """Return the strategy of `trainer.strategy`: ddp, fsdp, or a node with a `_target_`.

    Raises:
        ConfigError: the node does not build a Strategy, or settings exclude each other.
    """
    settings = {key: trainer_conf[key] for key in STRATEGY_KEYS}
    strategy = settings.pop("strategy")
    if isinstance(strategy, dict):
        expected = "a class that is derived from distrain.distributed.Strategy"
        strategy = build_as(Strategy, strategy, "trainer.strategy", expected)
    return make_strategy(strategy, **settings)
