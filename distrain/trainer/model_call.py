"""Call the model with a batch; validate and sum its losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.trainer.loss import Loss, WeightedLosses


def takes_whole_batch(model: nn.Module) -> bool:
    """Whether the model's forward has exactly one parameter, which takes the batch as it is."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = {p.kind for p in parameters}
    starred = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return len(parameters) == 1 and not kinds & starred


def call(model: Callable[..., Any], batch: Any, *, whole: bool) -> Any:
    """Call a model, or a method of it, with a batch.

    Args:
        model: the model or the method.
        batch: a tensor, or a tuple, list or dict of arguments.
        whole: pass the batch as one argument.
    """
    return caller(model, type(batch), whole=whole)(batch)


def caller(model: Callable[..., Any], kind: type, *, whole: bool) -> Callable[[Any], Any]:
    """Return the function that calls a model with batches of one type; see `call`."""
    if not whole and issubclass(kind, Mapping):
        return lambda batch: model(**batch)
    if not whole and issubclass(kind, Sequence):
        return lambda batch: model(*batch)
    return model


def total_loss(output: Any) -> dict[str, Tensor]:
    """Return named losses with their sum as "loss"; `WeightedLosses` if one is a `Loss`.

    Args:
        output: a tensor with one element, a `Loss`, or a mapping of such; else ConfigError.
    """
    if isinstance(output, Tensor) and output.numel() == 1:
        return {"loss": _zero_dim(output)}
    if isinstance(output, Loss):
        return WeightedLosses({"loss": output})
    if isinstance(output, Mapping) and output:
        is_weighted = False
        for name, loss in output.items():
            check_name("the model's forward", name)
            if isinstance(loss, Loss):
                is_weighted = True
            elif not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ConfigError(
                    f"the model's forward returned {name!r}: {_describe(loss)}; expected a tensor "
                    "with one element. Return losses only, and record the rest by "
                    "get_event_storage().put_scalar"
                )
        if "loss" in output and len(output) > 1:
            raise ConfigError(
                f"the model's forward returned 'loss' among {list(output)}: expected the parts "
                "only, whose sum is the loss, or the loss only"
            )
        if is_weighted:
            return WeightedLosses(output)
        if "loss" in output:
            return {"loss": _zero_dim(output["loss"])}
        total = torch.stack([_zero_dim(loss) for loss in output.values()]).sum()
        return {"loss": total, **output}
    raise ConfigError(
        f"the model's forward returned {_describe(output)}: expected a loss in training, a tensor "
        "with one element, or a dict of losses by name"
    )


def check_name(source: str, name: object) -> None:
    """Raise ConfigError unless the name of a loss or a metric is text; `source` returned it."""
    if not isinstance(name, str):
        raise ConfigError(f"{source} returned {name!r} as a name: expected text, as {str(name)!r}")


def mean_losses(
    parts: Sequence[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the mean of each loss over the forwards that returned it, and the weights below 1.

    A loss that some forwards returned weighs less in the mean over ranks: its weight is the
    fraction of forwards that returned it. Example: {loss: 1, a: 1}, {loss: 5, a: 3, b: 2} give
    {loss: 3, a: 2, b: 2} and {b: 0.5}.

    Args:
        parts: losses by name, () each, per forward of one step.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    found = {
        name: [part[name].detach().reshape(()) for part in parts if name in part] for name in names
    }
    means = {name: torch.stack(losses).mean() for name, losses in found.items()}
    rare = {name: len(found[name]) / len(parts) for name in names if len(found[name]) < len(parts)}
    return means, rare


def _zero_dim(loss: Tensor) -> Tensor:
    return loss.reshape(()) if loss.dim() else loss  # a reshape adds a node to the graph


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {[*value.shape]}"
    return f"{type(value).__name__} ({str(value)[:60]})"
