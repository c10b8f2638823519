"""Optimizers by name: their check, and their state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError

ONLY = ""
"""Name of the optimizer where there is one alone."""

_SHOWN = 3  # names in a message


def by_name(optimizer: Optimizer | Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Return optimizers by name; one alone has the name ONLY."""
    return dict(optimizer) if isinstance(optimizer, Mapping) else {ONLY: optimizer}


def check(model: nn.Module, optimizers: Mapping[str, Optimizer], *, has_step: bool) -> None:
    """Check that the optimizers and the step go with the model.

    Raises:
        ConfigError: several models or optimizers without a step; a trained parameter is in two
            optimizers, or in none of several; or an optimizer needs a closure, without a step.
    """
    for name, optimizer in optimizers.items():
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        # a step of the user's own may call it with one
        if not has_step and closure is not None and closure.default is closure.empty:  # LBFGS
            key, kind = f"optim.{name}".rstrip("."), type(optimizer).__name__
            expected = "an optimizer whose step takes no closure, such as AdamW"
            raise ConfigError(f"{key}: {kind} calls the model several times: expected {expected}")
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
    """Return "model", "optimizer", by name where there are several, and "parameters".

    The last has the names of the parameters of each optimizer: its own state has their numbers.
    """
    states = {name: strategy.state_dict(module, each) for name, each in optimizers.items()}
    first = next(iter(states.values()))
    by_number = {name: state["optimizer"] for name, state in states.items()}
    names_of = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {
        name: [names_of.get(id(p), "") for p in _parameters(each)]
        for name, each in optimizers.items()
    }
    return {**first, "optimizer": by_number.get(ONLY, by_number), "parameters": names}


def load_state_dict(
    strategy: Strategy,
    module: nn.Module,
    optimizers: Mapping[str, Optimizer],
    state: Mapping[str, Any],
) -> None:
    """Load what `state_dict` returned; ConfigError if it is of other optimizers or parameters."""
    saved = {ONLY: state["optimizer"]} if ONLY in optimizers else state["optimizer"]
    if saved.keys() != optimizers.keys():
        raise ConfigError(
            f"optim: {', '.join(optimizers)}: expected those of the checkpoint, "
            f"{', '.join(map(str, saved))}; begin another run with run.name=..."
        )
    own = dict(module.named_parameters(remove_duplicate=False))
    for name, optimizer in optimizers.items():
        names = state.get("parameters", {}).get(name, ())  # an earlier version saved none
        _check_parameters(name, optimizer, saved[name], names, own)
        strategy.load_state_dict(module, optimizer, {**state, "optimizer": saved[name]})


def _check_parameters(
    name: str,
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    names: Sequence[str],
    own: Mapping[str, nn.Parameter],
) -> None:
    """Check that a saved state is of the optimizer's parameters, in the same order.

    Torch goes by their numbers: a parameter would get the state of another one, as its momentum. A
    saved name that the model no longer has may be an earlier name of the same parameter.

    Args:
        name: of the optimizer.
        optimizer: of this run.
        saved: its state in the checkpoint.
        names: of the parameters in the checkpoint, in order; empty if it has none.
        own: all parameters of the model by name.
    """
    sizes, others = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, saved["param_groups"])
    )
    names_of = {id(parameter): here for here, parameter in own.items()}
    moved = [
        f"{there} (here {names_of.get(id(parameter), 'another')})"
        for there, parameter in zip(names, _parameters(optimizer), strict=False)
        if there in own and own[there] is not parameter
    ]
    # a hook of torch's before loading is there to put a state in order
    if (sizes == others and not moved) or optimizer._optimizer_load_state_dict_pre_hooks:
        return
    key = f"optim.{name}" if name else "optim"
    if sizes != others:
        found = f"parameter groups of {others} tensors, here of {sizes}"
    else:
        more = f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
        shown = ", ".join(moved[:_SHOWN])
        found = f"states of other parameters, or in another order: {shown}{more}"
    raise ConfigError(
        f"{key}: the checkpoint has {found}; train the same parameters as before, or begin another "
        "run from its weights with run.name=... and init.weights"
    )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
