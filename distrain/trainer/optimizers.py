"""Optimizers by name: their check, and their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError

ONLY = ""
"""Name of the optimizer where there is one alone."""


def by_name(optimizer: Optimizer | Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Return optimizers by name; one alone has the name ONLY."""
    return dict(optimizer) if isinstance(optimizer, Mapping) else {ONLY: optimizer}


def check(model: nn.Module, optimizers: Mapping[str, Optimizer], *, has_step: bool) -> None:
    """Check that the optimizers and the step go with the model.

    Raises:
        ConfigError: several models or optimizers without a step; or a trained parameter is in two
            optimizers, or in none of several.
    """
    if not has_step and (isinstance(model, nn.ModuleDict) or ONLY not in optimizers):
        key, names = ("optim", optimizers) if ONLY not in optimizers else ("model", model)
        raise ConfigError(
            f"{key}: {', '.join(_names(names))}: expected one; several need a step that trains "
            "them: step._target_=my_project.MyStep, a class of distrain.Step"
        )
    if ONLY in optimizers:
        return
    owners: dict[int, str] = {}
    names_of = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, optimizer in optimizers.items():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise ConfigError(
                    f"optim.{name}: parameter {names_of.get(id(parameter), '?')} is also in "
                    f"optim.{other}: expected it in one optimizer; freeze it or name other parts"
                )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owners:
            raise ConfigError(
                f"optim: parameter {name} is in none of {', '.join(optimizers)}: expected it in "
                "one; add an optimizer, or set requires_grad=False"
            )


def _names(named: Any) -> Iterable[str]:
    names: Iterable[str] = named.keys()
    return names


def state_dict(
    strategy: Strategy, module: nn.Module, optimizers: Mapping[str, Optimizer]
) -> dict[str, Any]:
    """Return "model", and "optimizer", by name where there are several."""
    states = {name: strategy.state_dict(module, each) for name, each in optimizers.items()}
    if ONLY in states:
        return states[ONLY]
    first = next(iter(states.values()))
    return {**first, "optimizer": {name: state["optimizer"] for name, state in states.items()}}


def load_state_dict(
    strategy: Strategy,
    module: nn.Module,
    optimizers: Mapping[str, Optimizer],
    state: Mapping[str, Any],
) -> None:
    """Load what `state_dict` returned; ConfigError if it is of other optimizers."""
    if ONLY in optimizers:
        strategy.load_state_dict(module, optimizers[ONLY], state)
        return
    saved = state["optimizer"]
    if saved.keys() != optimizers.keys():
        raise ConfigError(
            f"optim: {', '.join(optimizers)}: expected those of the checkpoint, "
            f"{', '.join(map(str, saved))}; begin another run with run.name=..."
        )
    for name, optimizer in optimizers.items():
        strategy.load_state_dict(module, optimizer, {**state, "optimizer": saved[name]})
