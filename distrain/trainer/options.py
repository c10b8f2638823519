"""Check the Trainer's keywords, and those that exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrain.errors import ConfigError


def check_step(
    precision: str,
    nonfinite: str,
    accumulation: int,
    clip: Mapping[str, float | None],
    ddp: Mapping[str, Any],
) -> None:
    """Check the keywords of the step.

    Args:
        precision: see `Trainer`.
        nonfinite: see `Trainer`.
        accumulation: see `Trainer`.
        clip: clip_norm as "norm", clip_value as "value".
        ddp: see `Trainer`.

    Raises:
        ConfigError: one has a value that is not allowed, or two exclude each other.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"trainer.precision={precision!r}; choose fp32, bf16 or fp16")
    if nonfinite not in ("stop", "skip"):
        raise ConfigError(f"trainer.nonfinite={nonfinite!r}; choose stop or skip")
    if accumulation < 1:
        raise ConfigError(f"trainer.accumulation={accumulation}; it is at least 1")
    if None not in clip.values():
        raise ConfigError("trainer.clip_norm and trainer.clip_value are both set; keep one")
    if accumulation > 1 and ddp.get("static_graph"):
        raise ConfigError(
            f"trainer.ddp.static_graph=true: expected trainer.accumulation=1, not {accumulation}: "
            "DDP fails where gradients are not combined in each backward; leave static_graph out"
        )


def check_strategy(strategy: str, *, plain: bool) -> None:
    """Check the strategy.

    Args:
        strategy: see `Trainer`.
        plain: whether all keywords that fsdp excludes have their defaults.

    Raises:
        ConfigError: it does not exist, or does not go with another keyword.
    """
    if strategy not in ("ddp", "fsdp"):
        raise ConfigError(f"trainer.strategy={strategy!r}; choose ddp or fsdp")
    if strategy == "fsdp" and not plain:
        raise ConfigError(
            "trainer.strategy=fsdp does not go with trainer.compile, trainer.channels_last, "
            "trainer.comm_hook or trainer.precision=fp16; leave them at their defaults (bf16 works)"
        )
