"""Predictions: results of `model.predict(batch)` by name, joined over batches and ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distrain.errors import ConfigError

_PAIR = ("preds", "target")


def named(found: Any) -> dict[str, Any]:
    """Return predictions by name.

    Args:
        found: a mapping as it is; a pair is `preds` and `target`, a longer tuple "0", "1", ...;
            anything else is `prediction`.
    """
    if isinstance(found, Mapping):
        return {str(name): value for name, value in found.items()}
    if isinstance(found, tuple):
        names = _PAIR if len(found) == len(_PAIR) else map(str, range(len(found)))
        return dict(zip(names, found, strict=True))
    return {"prediction": found}


def taken_by(key: str, function: Callable[..., Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the predictions that a function takes; `**kwargs` takes all.

    Raises:
        ConfigError: one that it needs is missing.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return dict(found)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(found)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in by_name if p.default is p.empty and p.name not in found]
    if missing:
        raise ConfigError(
            f"{key}: takes {', '.join(p.name for p in by_name)}, but predict() returned "
            f"{', '.join(map(repr, found))}; return {missing[0]!r} too"
        )
    return {p.name: found[p.name] for p in by_name if p.name in found}


def arguments_of(
    key: str, function: Callable[..., Any], found: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional arguments and the keywords that predictions are for a function."""
    if isinstance(found, Mapping):
        return (), taken_by(key, function, found)
    return (found if isinstance(found, tuple) else (found,)), {}


class Predictions:
    """Predictions of this rank, on the CPU, in the order of its samples."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Any]] = {}

    def add(self, found: Mapping[str, Any], length: int) -> None:
        """Append the predictions of a batch.

        Args:
            found: by name: (length, ...) tensors, or lists of one value per sample; else
                ConfigError.
            length: number of samples.
        """
        for name, value in found.items():
            is_tensor = isinstance(value, Tensor)
            if not is_tensor and not isinstance(value, list | tuple):
                raise _not_per_sample(name, type(value).__name__, length)
            if is_tensor and value.shape[:1] != (length,):
                raise _not_per_sample(name, str([*value.shape]), length)
            if not is_tensor and len(value) != length:
                raise _not_per_sample(name, f"a list of {len(value)}", length)
            self._parts.setdefault(name, []).append(_on_cpu(value))

    def joined(self) -> dict[str, Any]:
        """Return each name's predictions: one (N, ...) tensor, or a list of N; see `join`."""
        return {name: join(parts) for name, parts in self._parts.items()}


def join(parts: Sequence[Any]) -> Any:
    """Return the parts as one (N, ...) tensor if their shapes allow it, else as a list of N."""
    first = parts[0]
    if isinstance(first, Tensor) and all(
        isinstance(part, Tensor) and part.shape[1:] == first.shape[1:] and part.dtype is first.dtype
        for part in parts
    ):
        return torch.cat([*parts])
    return [*chain.from_iterable(parts)]


def join_ranks(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the predictions of all ranks by name, in order; a rank may have none.

    Raises:
        ConfigError: a name is missing on some ranks, or in some batches.
    """
    filled = [rank for rank in ranks if rank]
    whole = {}
    for name in dict.fromkeys(chain.from_iterable(filled)):
        if not all(name in rank for rank in filled):
            raise ConfigError(f"predict() returned {name!r} for some samples only")
        whole[name] = join([rank[name] for rank in filled])
    sizes = {name: len(value) for name, value in whole.items()}
    if len({*sizes.values()}) > 1:
        raise ConfigError(f"predict() returned some names for some samples only: {sizes}")
    return whole


def _not_per_sample(name: str, got: str, length: int) -> ConfigError:
    return ConfigError(
        f"predict() returned {name!r}: {got}; expected [{length}, ...], or a list of one value per "
        "sample"
    )


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {name: _on_cpu(part) for name, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, list | tuple) else value
