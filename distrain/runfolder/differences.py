"""Differences between two configurations, key by key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that differ, with both values; None for a missing key."""
    a, b = _flat(old), _flat(yaml.safe_load(yaml.safe_dump(dict(new))))
    keys = [*a, *(key for key in b if key not in a)]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def is_data_path(key: str, old: Any, new: Any) -> bool:
    """Return whether both values of a key of the data are paths."""
    # data on a local disk has another path in each job ($SLURM_TMPDIR)
    return key.startswith("data.") and all(isinstance(v, str) and os.sep in v for v in (old, new))


def covers(keys: Sequence[str], key: str) -> bool:
    """Return whether `key` is one of the dotted keys, or below one."""
    return any(key == each or key.startswith(each + ".") for each in keys)
