"""Parameters that were frozen when training was set up, and require gradients now."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from torch.optim import Optimizer

from distrain.errors import ConfigError

_MAX_LISTED = 5  # names in an error


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require no gradient, by name."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def check_still_frozen(
    frozen: dict[str, nn.Parameter],
    optimizers: Iterable[Optimizer],
    reduced: Collection[str] | None,
) -> None:
    """Check that no parameter was unfrozen that would not be trained, or differ between ranks.

    Args:
        frozen: the parameters that were frozen at the start, by name.
        optimizers: hold the trained parameters in their groups.
        reduced: names of the parameters whose gradients are reduced over ranks; None for all.

    Raises:
        ConfigError: one requires gradients, and is in no group or not reduced over ranks.
    """
    thawed = {name: p for name, p in frozen.items() if p.requires_grad}
    if not thawed:
        return
    trained = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    lost = [name for name, p in thawed.items() if id(p) not in trained]
    apart = [name for name in thawed if reduced is not None and name not in reduced]
    if not lost and not apart:
        return
    names = lost or apart
    shown = ", ".join(names[:_MAX_LISTED]) + (" and others" if names[_MAX_LISTED:] else "")
    problem = "are in no group of the optimizer" if lost else "DDP does not reduce over ranks"
    raise ConfigError(
        f"requires_grad=True was set during training for {len(names)} parameters that {problem} "
        f"({shown}): expected the same parameters as at the start; let them require gradients from "
        "the start; hooks.thaw (distrain.hooks.Thaw) freezes them until an iteration"
    )
