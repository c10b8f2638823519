"""Hyperparameters of a run: the keys of its configuration that change the result of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WITHOUT_EFFECT = (
    *("run", "resume", "plan", "sweep", "checkpoint", "launch", "hooks", "allow_changes"),
)


def hyperparameters(conf: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and the values of a configuration."""
    yield from _flat({key: v for key, v in conf.items() if key not in _WITHOUT_EFFECT}, "")


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
